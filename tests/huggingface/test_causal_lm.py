"""`MhcForCausalLM` computes what its network computes, with padding anywhere and with a cache."""

import pytest
import torch
from causal_lms import ENGRAM, OVER_ENCODING, tiny_config
from transformers import DynamicCache

from mhc_lightning.errors import UserError
from mhc_lightning.huggingface import MhcCache, MhcConfig, MhcForCausalLM

LENGTHS = (9, 4, 7)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def tokens():
    found = torch.randint(4, 40, (3, 9))
    found[:, [1, 5]] = 5  # ends documents, for a model that keeps them apart
    return found


def padded(tokens, side):
    """The first tokens of each row, so many as in LENGTHS, and the mask of a padded batch."""
    ids, mask = torch.full_like(tokens, 3), torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, place], mask[row, place] = tokens[row, :length], 1
    return ids, mask


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(model, tokens, side):
    model.double()
    ids, mask = padded(tokens, side)
    logits = model(ids, attention_mask=mask).logits
    last = model(ids, attention_mask=mask, logits_to_keep=2).logits
    assert torch.equal(last, logits[:, -2:])
    for row, length in enumerate(LENGTHS):
        alone = model.model(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(logits[row][mask[row] == 1], alone, rtol=1e-11, atol=1e-11)


def test_holes_in_the_mask_are_left_out(build, tokens):
    mask = torch.ones_like(tokens)
    mask[:, [2, 5]] = 0
    logits = build()(tokens, attention_mask=mask).logits
    kept = [0, 1, 3, 4, 6, 7, 8]
    close(logits[:, kept], build().model(tokens[:, kept]))


def test_without_padding_the_logits_are_the_networks(model, tokens):
    assert torch.equal(model(tokens).logits, model.model(tokens))
    assert torch.equal(model(tokens, attention_mask=torch.ones(3, 9)).logits, model.model(tokens))
    chosen = model(tokens, logits_to_keep=torch.tensor([0, 4])).logits
    assert torch.equal(chosen, model.model(tokens)[:, [0, 4]])


def test_the_loss_is_the_one_of_transformers(model, tokens):
    labels = tokens.clone()
    labels[:, :3] = -100
    logits = model.model(tokens)[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, targets)
    close(model(tokens, labels=labels).loss, expected)
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    close(model(tokens, labels=labels, num_items_in_batch=50).loss, total / 50)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_predicts_nothing(build, tokens, side):
    model = build()
    ids, mask = padded(tokens, side)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    losses = [
        torch.nn.functional.cross_entropy(
            model.model(tokens[row : row + 1, : n - 1])[0], tokens[row, 1:n], reduction="sum"
        )
        for row, n in enumerate(LENGTHS)
    ]
    close(loss, sum(losses) / sum(n - 1 for n in LENGTHS))


@pytest.mark.parametrize("num_items", [None, 50])
def test_over_decoding_adds_its_loss_in_training(build, tokens, num_items):
    model = build(memory=OVER_ENCODING)
    plain = model(tokens, labels=tokens, num_items_in_batch=num_items).loss
    network = model.train().model
    expected = network.loss(tokens[:, :-1], tokens[:, 1:])
    if num_items is not None:
        expected = expected * tokens[:, 1:].numel() / num_items
    loss = model(tokens, labels=tokens, num_items_in_batch=num_items).loss
    close(loss, expected)
    assert loss > plain


def test_a_cache_changes_no_logits(model, tokens):
    """Rows of unequal length, padded at the left, continued by one token and by several."""
    model.double()
    ids, mask = padded(tokens, "left")
    more = torch.randint(4, 40, (3, 6))
    whole = torch.cat([ids, more], 1)
    seen = torch.cat([mask, torch.ones_like(more)], 1)
    expected = model(whole, attention_mask=seen).logits
    out = model(ids, attention_mask=mask, use_cache=True)
    cache, logits = out.past_key_values, [out.logits]
    for start, end in ((0, 1), (1, 2), (2, 6)):
        part = seen[:, : 9 + end]
        out = model(more[:, start:end], attention_mask=part, past_key_values=cache)
        logits.append(out.logits)
        assert out.past_key_values is cache and cache.get_seq_length() == 9 + end
    found = torch.cat(logits, 1)
    torch.testing.assert_close(found[seen == 1], expected[seen == 1], rtol=1e-10, atol=1e-10)


def test_generate_continues_ragged_prompts_as_if_each_were_alone(model, tokens):
    ids, mask = padded(tokens, "left")
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, length in enumerate(LENGTHS):
        prompt = tokens[row : row + 1, :length]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)[0, length:]
        assert torch.equal(together[row, 9 : 9 + len(alone)], alone)
        for _ in range(3):  # by the definition of greedy decoding
            token = model.model(prompt)[0, -1].argmax()
            assert token == alone[prompt.shape[1] - length]
            if token == 3:
                break
            prompt = torch.cat([prompt, token.view(1, 1)], 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"num_beams": 2, "do_sample": True},
    ],
)
def test_generation_with_and_without_a_cache_gives_the_same(model, tokens, settings):
    ids, mask = padded(tokens, "left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        settings = {"max_new_tokens": 6, "use_cache": use_cache, **settings}
        found.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*found)


@pytest.mark.parametrize("helper", ["assistant", "prompt_lookup"])
def test_assisted_decoding_gives_the_same_text(build, tokens, helper):
    model = build(connection="SinglePassHyperConnection")
    prompt = tokens[:1].repeat(1, 2)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12}
    plain = model.generate(prompt, do_sample=False, **settings)
    more = (
        {"assistant_model": build()} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    )
    assert torch.equal(model.generate(prompt, do_sample=False, **settings, **more), plain)


@pytest.mark.parametrize("changes", [{"memory": ENGRAM}, {"document_end": 5}])
def test_what_knows_the_last_tokens_alone_takes_none_back(build, tokens, changes):
    model = build(**changes)
    cache = model(tokens, use_cache=True).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 9
    with pytest.raises(UserError, match="without an assistant model and without prompt lookup"):
        cache.crop(-1)


def test_a_cache_is_cropped_reordered_and_repeated(build, tokens):
    model = build()
    cache = MhcCache(model.model)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    model(tokens, past_key_values=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (7, 6, 2)
    new = tokens[:1, :2].expand(6, -1)
    rows = tokens[[2, 2, 0, 0, 0, 0], :7]
    close(
        model(new, past_key_values=cache).logits,
        model(torch.cat([rows, new], 1)).logits[:, 7:],
    )
    cache.reset()
    close(model(tokens, past_key_values=cache).logits, model(tokens).logits)
    cache.reset()  # by the name that transformers 5.24 passes it by
    close(model(tokens, cache=cache).logits, model(tokens).logits)
    assert cache.get_seq_length() == tokens.shape[1]


def test_what_the_model_does_not_take_is_refused(build, tokens):
    model = build()
    with pytest.raises(UserError, match="does not take position_ids; it takes input_ids"):
        model(tokens, position_ids=torch.arange(9)[None])
    model(tokens, output_attentions=False, inputs_embeds=None)
    with pytest.raises(UserError, match=r"attention_mask is \[3, 4\].*must be \[3, 9\]"):
        model(tokens, attention_mask=torch.ones(3, 4))
    with pytest.raises(UserError, match="has no static cache; leave out cache_implementation"):
        model.generate(tokens, cache_implementation="static")
    with pytest.raises(UserError, match="in an MhcCache, not in a DynamicCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(UserError, match="an output projection of its own"):
        MhcForCausalLM(MhcConfig(network=tiny_config().network, tie_word_embeddings=True))
    with pytest.raises(UserError, match="MhcConfig describes no network"):
        MhcForCausalLM(MhcConfig())


def test_the_vocabulary_grows_and_shrinks(build, tokens):
    model = build()
    before = model(tokens).logits.detach()
    model.resize_token_embeddings(44)
    assert model.config.vocab_size == model.model.vocab_size == 44
    assert torch.equal(model(tokens).logits[..., :40], before)
    model(tokens, labels=tokens + 4).loss.backward()
    model.resize_token_embeddings(40)
    assert torch.equal(model(tokens).logits, before)
    with pytest.raises(UserError, match="rows of a memory of n-grams depend on the vocabulary"):
        build(memory=ENGRAM).resize_token_embeddings(44)
