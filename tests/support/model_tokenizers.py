"""Small tokenizers as pretrained models have them, and small GGUF files."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_TEXT = ["the cat and the dog and the bird", "a fast bird"] * 20


def llama_like(folder: Path) -> Path:
    """A folder with a tokenizer that puts `<s>` before texts, and a chat template; 400 ids at most.

    Words are marked by a character before them, unknown characters are bytes; `</s>` ends texts.
    """
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    described = json.loads(tokenizer.to_str())
    # Bytes are no special tokens in files of Llama.
    described["added_tokens"] = described["added_tokens"][: len(special)]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return _saved(
        tokenizer, folder, "<s>", "</s>", "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )


def gpt2_like(folder: Path) -> Path:
    """A folder with a tokenizer of bytes that adds nothing to texts; `<|endoftext|>` is 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    trained.train_from_iterator(_TEXT, trainer)
    model = json.loads(trained.to_str())["model"]
    words = [word for word in model["vocab"] if word not in alphabet]
    vocabulary = [*alphabet, "<|endoftext|>", "<|start|>", *words]
    tokenizer = Tokenizer(
        models.BPE(
            {word: number for number, word in enumerate(vocabulary)},
            [tuple(pair) for pair in model["merges"]],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|start|>"])
    return _saved(tokenizer, folder, "<|endoftext|>", "<|endoftext|>")


def _saved(tokenizer: Any, folder: Path, begin: str, end: str, template: str | None = None) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_gguf(file: Path, folder: Path) -> Path:
    """A GGUF file of a Llama without weights, with the tokenizer of `gpt2_like` in a folder."""
    from gguf import GGUFWriter

    described = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_eos_token_id(vocabulary["<|endoftext|>"])
    writer.add_chat_template("{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
