"""What `--help` prints."""

from mhc_lightning.cli.experiments import shipped_experiments

_PROGRAM = "python -m mhc_lightning"

_OVERALL = f"""\
Train, watch and use language models with Hyper-Connections and mHC.

usage: {_PROGRAM} COMMAND --config PATH_OR_NAME [key=value ...]
       {_PROGRAM} report RUN [RUN ...]

commands:
  plan        what a run will need, and how long it should take
  prepare     turn text files into token chunks to train on
  fit         train, or go on with a run
  validate    loss and perplexity of a checkpoint on the validation text
  generate    continue a prompt with a checkpoint
  evaluate    run benchmarks on a checkpoint
  inspect     the stream matrices and gains of a checkpoint
  export      a checkpoint as safetensors, for other programs
  import      an exported model as a checkpoint to start from
  tune        make the kernels fit this machine's GPU and an experiment's shape
  report      what runs came to, on one page

options:
  --config PATH_OR_NAME   an experiment: a .yaml file, or the name of a shipped one (below)
  --print-config          show every setting and where its value comes from, and stop
  --help, --version       `{_PROGRAM} COMMAND --help` tells more of a command

Any setting is overridden by key=value, as in trainer.max_steps=200 or connection=hc.
The characters after `=` are taken as they are for prompts and paths (prompt, input, output,
ckpt_path, output_dir, data.path, prepare.tokenizer, picture, times); quote them only for your
shell.

settings most often changed:
  connection=mhc|hc|residual     the residual connection; also mhc_single_pass, mhc_lite, krom,
                                 identity, hc_static, hc_linear
  model.dim, model.num_layers    width and depth (blocks); model.num_streams is n
  data.path                      folder that `prepare` wrote
  data.batch_size                sequences per optimizer step, over all devices
  trainer.max_steps              optimizer steps
  trainer.devices, strategy=ddp  several devices
  optimizer.lr, seed
  output_dir                     where a run writes everything

shipped experiments:
{{experiments}}

example, from text to text:
  {_PROGRAM} prepare  --config mhc_quickstart input=my_texts output=data/mine
  {_PROGRAM} fit      --config mhc_quickstart data.path=data/mine output_dir=runs/mine
  tensorboard --logdir runs/mine
  {_PROGRAM} report   runs/mine
  {_PROGRAM} generate --config mhc_quickstart data.path=data/mine output_dir=runs/mine \\
      ckpt_path=last prompt="Once upon"

exit codes: 0 done; 2 a mistake in what was asked for (the last line of standard error says which);
3 the loss became NaN or infinite; 4 the machine ended it: a process died, hung, was cut off or ran
out of memory; 130 interrupted; 143 stopped by SIGTERM, after saving; 1 a bug. All processes of a
run end with the same one."""

_COMMANDS = {
    "plan": f"""\
Tell what a run will need and how long it should take. Nothing is allocated and no data are read.

usage: {_PROGRAM} plan --config PATH_OR_NAME [machine=8xh200] [key=value ...]

  machine=NxKIND       what to plan for: a number of a100, h100, h200, b200 or cpu; without it, this
                       machine with trainer.devices
  picture=FILE.png     strategy=pipeline: draw who does what when, in one pass of the schedule
  times=FILE.json      strategy=pipeline: take the stages' times from measurements, in seconds for
                       one micro-batch: {{"stages": [{{"forward": 0.01, "backward": 0.02}}, ...]}};
                       also backward_weight, replay, merge_forward, merge_backward of a stage, and
                       "transfers" and "update" beside "stages"
  --json               print one JSON object and nothing else on standard output

Prints parameters, memory per device by kind, arithmetic and stream traffic per token, and the time
per step that a roofline predicts. With strategy=pipeline also the memory of each device, and what
every schedule needs: memory, time and bubble, with communication and replay on the critical path
and overlapped, beside the same network with the ordinary residual connection. With machine=, a run
that does not fit ends with exit code 2, and the changes that would make it fit. `fit` checks the
same before it allocates anything, against the memory that is free, or against that of machine=.

examples:
  {_PROGRAM} plan --config mhc_27b machine=8xh200 strategy=fsdp
  {_PROGRAM} plan --config mhc_27b machine=8xh200 strategy=pipeline data.micro_batch_size=16 \\
      picture=pipeline.png""",
    "fit": f"""\
Train a model, or go on with a run.

usage: {_PROGRAM} fit --config PATH_OR_NAME [key=value ...]

  output_dir=DIR       holds everything the run writes: config.yaml (every setting, resolved),
                       environment.json (where and how it ran), metrics.csv, TensorBoard event
                       files, checkpoints/
  ckpt_path=last       go on from the newest checkpoint of output_dir, exactly as if the run had
                       not stopped; should it be damaged, from the one before, with a warning
  ckpt_path=PATH       go on from this checkpoint, a file or a folder of any layout
  overwrite=true       delete the run that output_dir holds and start anew

  trainer.max_steps=N             length, in optimizer steps
  trainer.val_check_interval=N    optimizer steps between validations
  trainer.log_every_n_steps=N     optimizer steps between rows of metrics.csv
  checkpoint.every_n_steps=N      optimizer steps between checkpoints; also saved at the end and
                                  on SIGTERM
  checkpoint.keep_last=N          newest checkpoints to keep (null: all)
  checkpoint.keep_every=N         keep those at multiples of N for good
  checkpoint.keep_best=N          also keep the best N by checkpoint.monitor
  checkpoint.sharded=true         a folder to which each process writes its own shards, instead of
                                  a file; auto does so under strategy=fsdp and strategy=pipeline
  checkpoint.asynchronous=true    train on while a folder is written, from a copy in CPU memory
  data.batch_size=N               sequences per optimizer step, over all devices
  data.micro_batch_size=N         sequences per forward pass; gradients are accumulated
  strategy=ddp|fsdp|pipeline|pipeline_or_fsdp, trainer.devices=N
  model.*, connection=…, optimizer.*, compile=true
  callbacks=alarm                 watch loss, gradient norm and gains, and say when one shoots up;
                                  callbacks.stability_alarm.actions=[warn,checkpoint,skip_update,
                                  lower_lr] (any of these) does more
  +logger.NAME._target_=CLASS     one more logger, with +logger.NAME.ARGUMENT=…

examples:
  {_PROGRAM} fit --config mhc_quickstart output_dir=runs/mine trainer.max_steps=200
  {_PROGRAM} fit --config mhc_quickstart output_dir=runs/mine ckpt_path=last""",
    "validate": f"""\
Measure a checkpoint on the validation text.

usage: {_PROGRAM} validate --config PATH_OR_NAME ckpt_path=last|best|PATH [key=value ...]

  --json               print one JSON object and nothing else on standard output
  ckpt_path=last|best  of the run in output_dir;  ckpt_path=PATH  any checkpoint
  data.path=DIR        what to validate on

Prints val/loss (nats per token), val/perplexity and val/tokens, the number of tokens they are the
mean over, and val/bits_per_byte where the data tell how many bytes a token stands for. The batches
and the number of devices don't matter.

example:
  {_PROGRAM} validate --config mhc_quickstart output_dir=runs/mine ckpt_path=last --json""",
    "generate": f"""\
Continue a prompt. The text goes to standard output as it is drawn, and nothing else does.

usage: {_PROGRAM} generate --config PATH_OR_NAME ckpt_path=last|best|PATH prompt=TEXT
       [key=value ...]

  prompt=TEXT          taken as it is: only your shell's own quotes matter
  max_new_tokens=N     length at most; it may end earlier, with the document
  temperature=T        0 takes the likeliest token each time
  top_k=K              draw from the K likeliest tokens
  top_p=P              draw from the likeliest tokens that hold the share P of the probability
  seed=N               the same seed gives the same text
  echo=false           leave the prompt out of the output

These are the settings of the section `generate` (temperature is short for generate.temperature).

example:
  {_PROGRAM} generate --config mhc_quickstart output_dir=runs/mine ckpt_path=last \\
      prompt="def f(x):" temperature=0.7 top_k=50 max_new_tokens=200""",
    "evaluate": f"""\
Run benchmarks of EleutherAI's lm-evaluation-harness on a checkpoint.

usage: {_PROGRAM} evaluate --config PATH_OR_NAME ckpt_path=last|best|PATH
       tasks=NAME[,NAME...] [key=value ...]

  tasks=NAME,NAME      tasks, groups or tags; `paper` is the paper's eight with its numbers of
                       examples: BBH 3, DROP 3, GSM8K 8, HellaSwag 10, MATH 4, MMLU 5, PIQA 0,
                       TriviaQA 5
  include_path=DIR     folder with tasks of your own (the harness's YAML files)
  num_fewshot=N        examples before each question, for tasks that have any
  limit=N              documents per task, for a first look
  batch_size=N         sequences per forward pass
  max_length=N         tokens that the model sees at once (data.sequence_length); the beginning of
                       what is longer is left out, with a warning
  --json               print one JSON object and nothing else on standard output

Needs the extra `evaluate` (pip install 'mhc-lightning[evaluate]'), and for the harness's own tasks
the hub or a local cache of it. Runs on one device, with trainer.precision. The results are also
written to output_dir/evaluation/. The tokenizer must be the one of the checkpoint: it comes from
data.path, from data.tokenizer (then no data are needed), or from an exported folder given as
ckpt_path.

example:
  {_PROGRAM} evaluate --config mhc_quickstart output_dir=runs/mine ckpt_path=last \\
      tasks=hellaswag,piqa limit=100""",
    "inspect": f"""\
Show the stream matrices and gains of a checkpoint, sub-layer by sub-layer.

usage: {_PROGRAM} inspect CHECKPOINT [input=TEXT] [output=DIR] [key=value ...]

  CHECKPOINT           a checkpoint in a run's checkpoints/ (also last, best), a run's folder, a
                       folder that `export` wrote, or a model in DeepSeek-V4's layout: a safetensors
                       file or a folder of them, of which only the connections are read
  input=TEXT           run the model on this text; without it the matrices are the static ones, of
                       the biases alone
  output=DIR           draw the gains, every matrix and their products there, as PNG files
  --json               print one JSON object and nothing else on standard output
  --config PATH_OR_NAME   the experiment of a checkpoint that lies in no run's folder
  key=value            settings of the run, such as data.path or data.tokenizer where input=TEXT
                       needs the tokenizer; of a DeepSeek-V4 model sinkhorn_iterations=20 and
                       eps=1e-6 (its hc_eps), where no config.json beside it says

Columns: the largest row sum (forward gain) and column sum (backward gain) of the matrix, the same
of the product from the first sub-layer to this one (forward) or from this one to the last
(backward), the largest distance of a column sum from 1, the mean of the diagonal, and the stream
that is read most with its share.

example:
  {_PROGRAM} inspect runs/mine/checkpoints/last input="Once upon a time" output=pictures""",
    "export": f"""\
Write a checkpoint's weights as safetensors, with what is needed to use them.

usage: {_PROGRAM} export --config PATH_OR_NAME ckpt_path=last|best|PATH output=DIR
       [key=value ...]

  output=DIR           the new folder: model.safetensors, config.json (the network and its
                       connections, the tokenizer's record, the steps trained) and tokenizer.json
  shard_bytes=N        bytes of tensors in one file at most; larger models get several files and an
                       index, as the Hugging Face libraries read them
  overwrite=true       replace a model that output holds

The tokenizer comes from the data; data.tokenizer=bytes, or the path of a tokenizer.json, does
without them. In Python: mhc_lightning.interchange.load_exported(DIR).

example:
  {_PROGRAM} export --config mhc_quickstart output_dir=runs/mine ckpt_path=last output=my_model""",
    "import": f"""\
Make a checkpoint of an exported model, bit for bit, in a new run folder.

usage: {_PROGRAM} import --config PATH_OR_NAME input=DIR output_dir=DIR [key=value ...]

  input=DIR            what `export` wrote
  output_dir=DIR       the new run; its ckpt_path=last is then the model
  overwrite=true       delete the run that output_dir holds

It holds weights alone: `fit` with it starts at step 0, with a new optimizer and at the beginning
of the data. The other commands also take the exported folder itself as ckpt_path.

example:
  {_PROGRAM} import --config mhc_quickstart input=my_model output_dir=runs/more
  {_PROGRAM} fit    --config mhc_quickstart output_dir=runs/more ckpt_path=last""",
    "tune": f"""\
Find the kernels' best block sizes for an experiment's shape, by measuring them on this GPU.

usage: {_PROGRAM} tune --config PATH_OR_NAME [key=value ...]

  connection=…, model.num_streams=N, model.dim=N, trainer.precision=…, recompute=…
                       the shape, if it is to be another than the experiment's
  data.micro_batch_size=N, data.sequence_length=N  tokens to measure with

Prints each kernel's time before and after, and enters the choices in a table of your own
(~/.cache/mhc_lightning/tuned, or $MHC_LIGHTNING_CACHE/tuned) that every later run on a GPU of this
name looks at first. The results of the kernels do not change, but for rounding. Takes minutes, most
of them compiling; shapes that were not tuned run with block sizes that suit most GPUs.

example:
  {_PROGRAM} tune --config mhc_3b""",
    "report": f"""\
Show what runs came to, on one page that needs nothing else.

usage: {_PROGRAM} report RUN [RUN ...] [output=DIR] [baseline=RUN]

  RUN                  a run's folder (what `fit` calls output_dir), or one that holds several;
                       taken literally, as the shell gives it
  output=DIR           where index.html, report.json (what --json prints) and figures/*.png go
                       (default: report); an earlier report there is replaced
  baseline=RUN         the run that the others are compared with; without it, the first with the
                       plain residual connection, else the first
  --json               print one JSON object and nothing else on standard output

On the page: a verdict on each run in plain words, a table (losses, the gap to the baseline with a
95% interval, largest gains, gradient norm, speed, memory), figures, the matrices that were drawn
last, what was run, and the command that does it again. Runs may still be going on, or have been
killed. metrics.csv is read where there is one, else TensorBoard event files with the same tags,
whoever wrote them; what is not recorded is said to be so.

example:
  {_PROGRAM} report runs/residual runs/hc runs/mhc output=comparison""",
    "prepare": f"""\
Turn text into token chunks for training: documents, a held-out validation split, a summary.

usage: {_PROGRAM} prepare --config PATH_OR_NAME input=PATH [input=PATH ...] output=DIR
       [key=value ...]

  input=PATH           a file or a folder: text, JSON Lines, and .gz or .zst of these; for several,
                       give the key several times
  output=DIR           the new folder; without it, the experiment's data.path
  tokenizer=bytes      one token per byte, or the path of a tokenizer.json

  text_field=NAME      the text's key in JSONL lines, or its column in a dataset
  validation_fraction=0.01        share of the documents to hold out
  include=['*.py'] exclude=[tests]  patterns of files, and of files and folders
  as_text=['*.csv']    patterns of files that are plain text, though they look like something else
  num_workers=N        processes (default: one per core)
  overwrite=true       replace an output made from other input or with other settings

An interrupted run goes on where it was when the same command is given again. `input` also takes
Hugging Face datasets, as hf://NAME[/CONFIG][:SPLIT] (needs the extra `datasets`).
These are the settings of the section `prepare` (text_field is short for prepare.text_field).

example:
  {_PROGRAM} prepare --config mhc_quickstart input=books input=notes.txt output=data/mine""",
}


def overall_help() -> str:
    """Help on the program, with the experiments that are shipped."""
    experiments = shipped_experiments()
    width = max(map(len, experiments), default=0)
    listed = "\n".join(f"  {name:<{width}}  {about}" for name, about in experiments.items())
    return _OVERALL.format(experiments=listed)


def command_help(command: str) -> str:
    """Help on a command."""
    return _COMMANDS[command]
