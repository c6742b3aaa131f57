"""The table of commands: the name, arguments, function and help of each.

A new command is one entry here and the module that it runs.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: The word typed.
        about: One line for the list of commands.
        module: Module of this package that has the function of the same name (`function`, if not).
        usage: The arguments after the name.
        description: What it does, the first paragraph of its help.
        settings: Keys whose defaults and meanings its help lists, from the files in `configs/`; a
            section or a group stands for all of its keys.
        notes: The last paragraphs of its help: what the settings' comments do not say.
        examples: Command lines, without the program.
        section: Section of the configuration whose keys may be given without its name.
        paths: Arguments that are no `key=value`: none, the first one, or all that are not in
            `path_keys`.
        path_keys: Keys of a command whose other arguments are all paths.
        takes_experiment: True if it runs an experiment, which `--config` names; it is then called
            with the composed experiment and the arguments, else with the arguments alone.
        json: True if it has `--json`.
        function: Name of the function in `module`, if it is not the command's.
    """

    name: str
    about: str
    module: str
    usage: str
    description: str
    examples: tuple[str, ...]
    settings: tuple[str, ...] = ()
    notes: str = ""
    section: str = ""
    paths: Literal["none", "first", "all"] = "none"
    path_keys: tuple[str, ...] = ()
    takes_experiment: bool = True
    json: bool = False
    function: str = ""

    def load(self) -> Callable[..., None]:
        """The function to call; imports its module."""
        module = importlib.import_module(f"mhc_lightning.cli.{self.module}")
        function: Callable[..., None] = getattr(module, self.function or self.name)
        return function


_CHECKPOINT = "ckpt_path=last|best|PATH"

COMMANDS = {
    command.name: command
    for command in (
        Command(
            name="plan",
            about="memory, time and parameters of a run, before it starts",
            module="plan",
            usage="--config PATH_OR_NAME [machine=8xh200] [key=value ...]",
            description="Predict the memory and time that a run needs. Nothing is allocated and no"
            " data are read.",
            settings=("machine", "search", "picture", "times", "routing_imbalance"),
            notes="""\
A machine is NxKIND: a number of a100, h100, h200, b200, h800, l40s or cpu. Without machine=, it is
this one with trainer.devices.

Prints parameters, memory per device by kind, arithmetic and stream traffic per token, and the
time per step that a roofline predicts. With strategy=pipeline also the memory of each device, and
memory, time and bubble of every schedule, with communication and replay on the critical path and
overlapped, beside the same network with the ordinary residual connection. With machine=, a run
that does not fit ends with exit code 2, and the changes that would make it fit. `fit` makes the
same check before it allocates anything, against the memory that is free, or against that of
machine=.

With search=true, prints the ten fastest layouts that fit, among sizes of pipelines and groups of
experts, schedules, micro-batches and recompute, and why the first one wins.

The file of times= holds seconds for one micro-batch: {"stages": [{"forward": 0.01, "backward":
0.02}, ...]}; also backward_weight, replay, merge_forward, merge_backward of a stage, and
"transfers" and "update" beside "stages".""",
            examples=(
                "plan --config mhc_27b machine=8xh200 strategy=fsdp",
                "plan --config mhc_27b machine=8xh200 strategy=pipeline data.micro_batch_size=16"
                " picture=pipeline.png",
                "plan --config mhc_27b machine=64xh200 search=true",
            ),
            json=True,
        ),
        Command(
            name="prepare",
            about="turn text files into token chunks to train on",
            module="prepare",
            usage="--config PATH_OR_NAME input=PATH [input=PATH ...] [output=DIR] [key=value ...]",
            description="Turn text into token chunks for training: documents, a held-out validation"
            " split, a summary.",
            settings=("input", "output", "overwrite", "prepare"),
            notes="""\
input= is a file or a folder of text, JSON Lines, JSON arrays, CSV, TSV, Parquet, Arrow or WARC
(these three need the extra `formats`), of ZIP or tar archives of these, and of .gz, .zst, .bz2 or
.xz of these; the URL of any of them (s3://, https://, ...); or a Hugging Face dataset,
hf://NAME[/CONFIG][:SPLIT] (needs the extra `datasets`). Give it several times for several.
text_field= or text_template= names what the text of a record is.
An interrupted run goes on when the same command is given again.""",
            examples=(
                "prepare --config mhc_quickstart input=books input=notes.txt output=data/mine",
                "prepare --config mhc_quickstart input=articles.parquet output=data/articles"
                ' "text_template={title}\\n\\n{body}"',
            ),
            section="prepare",
        ),
        Command(
            name="fit",
            about="train a model, or resume a run",
            module="fit",
            usage="--config PATH_OR_NAME [key=value ...]",
            description="Train a model, or resume a run exactly, as if it had not stopped.",
            settings=(
                *("output_dir", "ckpt_path", "overwrite", "seed", "compile", "recompute"),
                *("trainer.max_steps", "trainer.val_check_interval", "trainer.log_every_n_steps"),
                *("trainer.devices", "trainer.precision", "data.path", "data.batch_size"),
                *("data.micro_batch_size", "data.sequence_length", "optimizer.lr", "checkpoint"),
            ),
            notes="""\
output_dir holds everything the run writes: config.yaml (every setting, resolved),
environment.json (where and how it ran), metrics.csv, TensorBoard event files and checkpoints/.
With ckpt_path=last, a newest checkpoint that is damaged is left out with a warning, and the one
before is used. A checkpoint is also saved at the end and on SIGTERM.

callbacks=alarm watches loss, gradient norm and gains, and warns when one shoots up;
callbacks.stability_alarm.actions=[warn,checkpoint,skip_update,lower_lr] (any of these) does more.
+logger.NAME._target_=CLASS adds a logger, with +logger.NAME.ARGUMENT=….""",
            examples=(
                "fit --config mhc_quickstart output_dir=runs/mine trainer.max_steps=200",
                "fit --config mhc_quickstart output_dir=runs/mine ckpt_path=last",
            ),
        ),
        Command(
            name="validate",
            about="loss and perplexity of a checkpoint on the validation text",
            module="validate",
            usage=f"--config PATH_OR_NAME {_CHECKPOINT} [key=value ...]",
            description="Measure a checkpoint on the validation text.",
            settings=("ckpt_path", "output_dir", "data.path", "data.validation_sequences"),
            notes="""\
Prints val/loss (nats per token), val/perplexity, val/tokens (the number of tokens they are the
mean over), and val/bits_per_byte where the data record how many bytes a token stands for. They do
not depend on the batches or the number of devices.""",
            examples=(
                "validate --config mhc_quickstart output_dir=runs/mine ckpt_path=last --json",
            ),
            json=True,
        ),
        Command(
            name="generate",
            about="continue a prompt with a checkpoint",
            module="generate",
            usage=f"--config PATH_OR_NAME {_CHECKPOINT} prompt=TEXT [key=value ...]",
            description="Continue a prompt. The text goes to standard output as it is drawn, and"
            " nothing else does.",
            settings=("ckpt_path", "output_dir", "prompt", "generate", "seed"),
            notes="The prompt is taken as it is: only your shell's own quotes matter. The same seed"
            " draws the same text.",
            examples=(
                "generate --config mhc_quickstart output_dir=runs/mine ckpt_path=last"
                ' prompt="def f(x):" temperature=0.7 top_k=50 max_new_tokens=200',
            ),
            section="generate",
        ),
        Command(
            name="evaluate",
            about="run benchmarks on a checkpoint",
            module="evaluate",
            usage=f"--config PATH_OR_NAME {_CHECKPOINT} tasks=NAME[,NAME...] [key=value ...]",
            description="Run benchmarks of EleutherAI's lm-evaluation-harness on a checkpoint.",
            settings=("ckpt_path", "output_dir", "evaluate"),
            notes="""\
tasks=paper runs the paper's eight with its numbers of examples: BBH 3, DROP 3, GSM8K 8, HellaSwag
10, MATH 4, MMLU 5, PIQA 0, TriviaQA 5. The beginning of what is longer than max_length is left
out, with a warning.

Needs the extra `evaluate` (pip install 'mhc-lightning[evaluate]'), and for the harness's own
tasks the hub or a local cache of it. Runs on one device, with trainer.precision. The results are
also written to output_dir/evaluation/. The tokenizer must be that of the checkpoint: it comes
from data.path, from data.tokenizer (then no data are needed), or from an exported folder given as
ckpt_path.""",
            examples=(
                "evaluate --config mhc_quickstart output_dir=runs/mine ckpt_path=last"
                " tasks=hellaswag,piqa limit=100",
            ),
            section="evaluate",
            json=True,
        ),
        Command(
            name="inspect",
            about="the stream matrices and gains of a checkpoint",
            module="inspect",
            usage="CHECKPOINT [input=TEXT] [output=DIR] [key=value ...]",
            description="Show the stream matrices and gains of a checkpoint by sub-layer.",
            notes="""\
  CHECKPOINT           a checkpoint in a run's checkpoints/ (also last, best), a run's folder, a
                       folder that `export` wrote, or a model in DeepSeek-V4's layout: a safetensors
                       file or a folder of them, of which only the connections are read
  input=TEXT           run the model on this text; without it the matrices are the static ones, of
                       the biases alone
  output=DIR           draw the gains, every matrix and their products there, as PNG files
  --config PATH_OR_NAME   the experiment of a checkpoint that lies in no run's folder
  key=value            settings of the run, such as data.path or data.tokenizer where input=TEXT
                       needs the tokenizer; of a DeepSeek-V4 model sinkhorn_iterations=20 and
                       eps=1e-6 (its hc_eps), where no config.json beside it has them

Columns: the largest row sum (forward gain) and column sum (backward gain) of the matrix, the same
of the product from the first sub-layer to this one (forward) or from this one to the last
(backward), the largest distance of a column sum from 1, the mean of the diagonal, and the stream
that is read most with its share. On a text follow, for each block whose memory has a gate, the
n-grams that open it most: the mean gate over streams, how often they occur, and the stream to which
they open it most; --json has all n-grams.""",
            examples=(
                'inspect runs/mine/checkpoints/last input="Once upon a time" output=pictures',
            ),
            paths="first",
            takes_experiment=False,
            json=True,
        ),
        Command(
            name="export",
            about="a checkpoint as safetensors, for other programs",
            module="export",
            usage=f"--config PATH_OR_NAME {_CHECKPOINT} output=DIR [key=value ...]",
            description="Write a checkpoint's weights as safetensors, and what using them needs.",
            settings=("ckpt_path", "output_dir", "output", "overwrite", "export"),
            notes="""\
output= is the new folder: model.safetensors, config.json (the network and its connections, the
tokenizer's record, the steps trained) and tokenizer.json. The tokenizer comes from the data;
data.tokenizer=bytes, or the path of a tokenizer.json, does without them. In Python:
mhc_lightning.interchange.load_exported(DIR).

form=huggingface writes what transformers' AutoModelForCausalLM and AutoTokenizer read once
mhc_lightning.huggingface is imported (pip install 'mhc-lightning[huggingface]').""",
            examples=(
                "export --config mhc_quickstart output_dir=runs/mine ckpt_path=last"
                " output=my_model",
                "export --config mhc_quickstart output_dir=runs/mine ckpt_path=last"
                " output=my_hf_model form=huggingface",
            ),
            section="export",
        ),
        Command(
            name="import",
            about="an exported model as a checkpoint to start from",
            module="import_model",
            function="import_model",
            usage="--config PATH_OR_NAME input=DIR output_dir=DIR [key=value ...]",
            description="Make a checkpoint of an exported model, bit for bit, in a new run folder.",
            settings=("input", "output_dir", "overwrite"),
            notes="""\
The checkpoint holds weights alone: `fit` with ckpt_path=last starts at step 0, with a new
optimizer and at the beginning of the data. The other commands also take the exported folder
itself as ckpt_path.""",
            examples=(
                "import --config mhc_quickstart input=my_model output_dir=runs/more",
                "fit --config mhc_quickstart output_dir=runs/more ckpt_path=last",
            ),
        ),
        Command(
            name="tune",
            about="measure the kernels' best block sizes on this machine's GPU",
            module="tune",
            usage="--config PATH_OR_NAME [key=value ...]",
            description="Find the kernels' best block sizes for an experiment's shape, by measuring"
            " them on this GPU.",
            settings=(
                *("model.num_streams", "model.dim", "trainer.precision", "recompute"),
                *("data.micro_batch_size", "data.sequence_length"),
            ),
            notes="""\
Prints each kernel's time before and after, and enters the choices in a table of your own
(~/.cache/mhc_lightning/tuned, or $MHC_LIGHTNING_CACHE/tuned) that every later run on a GPU of
this name looks at first. The results of the kernels do not change, but for rounding. Takes
minutes, most of them compiling; shapes that were not tuned run with block sizes that suit most
GPUs.""",
            examples=("tune --config mhc_3b",),
        ),
        Command(
            name="report",
            about="compare finished or running runs on one page",
            module="report",
            usage="RUN [RUN ...] [output=DIR] [baseline=RUN]",
            description="Compare runs on one page that needs no other file.",
            notes="""\
  RUN                  a run's folder (what `fit` calls output_dir), or one that holds several;
                       taken literally, as the shell gives it
  output=DIR           where index.html, report.json (what --json prints) and figures/*.png go
                       (default: report); an earlier report there is replaced
  baseline=RUN         the run that the others are compared with; without it, the first with the
                       plain residual connection, else the first; of these, one without a
                       memory if there is one

On the page: a verdict on each run in plain words, a table (losses, the gap to the baseline with a
95% interval, largest gains, gradient norm, speed, memory), one of n-gram memories (gates, rows
touched), figures, the matrices that were drawn last, the settings, and the command that repeats
the run. Runs may still be going on, or have been killed. metrics.csv is read where there is one,
else TensorBoard event files with the same tags, whoever wrote them; the page names what is not
recorded.""",
            examples=("report runs/residual runs/hc runs/mhc output=comparison",),
            paths="all",
            path_keys=("output", "baseline"),
            takes_experiment=False,
            json=True,
        ),
    )
}
