"""Entry point of ``python -m lit_align``."""

import codecs
import gc
import locale
import os
import signal
import sys

HELP = """usage: python -m lit_align COMMAND --config CONFIG [--config OVERLAY] [--KEY VALUE]

Align text-to-image diffusion models with rewards and preferences.

commands:
  fit         train
  validate    measure a checkpoint on the validation prompts
  test        compare a checkpoint with the pretrained model, on prompts that were never used
  predict     draw images of a checkpoint, with their prompts and rewards
  export      write what a run has trained for other programs, with a model card: export RUN
  pairs       make preference data from the images of predict, by a bank of rewards: pairs FOLDER
  report      one page about a tested run, or about several side by side: report RUN [RUN ...]
  doctor      find what would make a fit fail, in under a minute: doctor --config CONFIG
  serve       serve rewards to the runs of other processes and machines: serve --rewards bank.yaml

examples:
  python -m lit_align fit     --config configs/ddpo.yaml
  python -m lit_align fit     --config configs/ddpo.yaml --config configs/variant/redness.yaml
  python -m lit_align fit     --config configs/ddpo.yaml --ckpt_path last
  python -m lit_align test    --config configs/ddpo.yaml --ckpt_path last
  python -m lit_align export  logs/ddpo/version_0
  python -m lit_align doctor  --config configs/ddpo.yaml

more:
  --print_config after a configuration prints every value, with its default
  fit --help     every option of the Trainer and of the command
  fit --model.help DDPOModule, fit --data.help PromptDataModule     the options of a class
  --ckpt_path takes a checkpoint, the folder of a run, or last: the newest run of the configuration;
  auto resumes if this command has run before, and else starts: the same command for every start of a job"""

if __name__ == "__main__":
    if "utf8" not in sys._xoptions and codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        # Libraries read text in the encoding of the locale, and configurations and prompts are UTF-8.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    # Before torch is imported: threads that spin while they wait make a busy CPU several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP)  # at once: the libraries take seconds to load
    else:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load: no traceback of them
        gc.disable()  # a fifth of the time to load them goes into looking for garbage, of which there is none
        from lit_align.cli import main

        gc.freeze()  # what is loaded stays: later collections need not look at it
        gc.enable()
        main()
