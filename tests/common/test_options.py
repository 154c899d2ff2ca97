import argparse
import sys

import pytest
import torch

from k_diffusion.common import files, memory, options
from k_diffusion.common.text import need
from k_diffusion.config import make_model
from k_diffusion.config.load import parse
from k_diffusion.training.args import parse_args


@pytest.mark.parametrize("kind", [ValueError, ImportError, OSError, FloatingPointError])
def test_errors_become_sentences(kind, monkeypatch):
    @options.friendly_errors
    def main():
        raise kind("the rule, what it got, the remedy")

    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == "train.py: error: the rule, what it got, the remedy"
    monkeypatch.setenv("K_DIFFUSION_DEBUG", "1")
    with pytest.raises(kind):
        main()


def test_ctrl_c_needs_no_traceback(capsys):
    @options.friendly_errors
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_errors_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        options.friendly_errors(lambda: 1 / 0)()


def test_integers():
    assert (options.positive("3"), options.non_negative("0")) == (3, 0)
    for wrong, kind in (options.positive, "0"), (options.non_negative, "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be at least"):
            wrong(kind)


def test_sizes():
    assert options.size("256x384") == (256, 384)
    assert options.size("32") == (32, 32)
    for text in "0x4", "axb", "4x4x4", "":
        with pytest.raises(argparse.ArgumentTypeError):
            options.size(text)


def test_writable_makes_folders_and_refuses_early(tmp_path):
    path = tmp_path / "new" / "deep" / "x.png"
    assert files.writable(path) == path
    assert path.parent.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't make the folder of .*file/sub/x.png"):
        files.writable(tmp_path / "file" / "sub" / "x.png")
    with pytest.raises(IsADirectoryError, match="name a file"):
        files.writable(tmp_path / "new")


def test_help_tells_defaults_where_there_are_any():
    p = argparse.ArgumentParser(formatter_class=options.HelpFormatter)
    p.add_argument("-n", type=int, default=8, help="how many")
    p.add_argument("-c", nargs="+", default=["a", "b"], help="which")
    p.add_argument("-m", help="maybe")
    p.add_argument("-o", nargs="?", default="off", help="or")
    p.add_argument("-f", action="store_true", help="on")
    p.add_argument("-l", action="append", default=[], help="some")
    lines = [line.split("  ")[-1].strip() for line in p.format_help().split("\n")[4:] if line]
    assert lines == [
        "how many (default: 8)",
        "which (default: a b)",
        "maybe",
        "or (default: off)",
        "on",
        "some",
    ]


def test_published_flags_and_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "c.json"])
    published = {
        "batch_size": 64, "checkpointing": "off", "clip_model": "ViT-B/16", "compile": None,
        "demo_every": 500, "dinov2_model": "vitl14", "end_step": None, "evaluate_every": 10000,
        "evaluate_n": 2000, "evaluate_only": False, "evaluate_with": "inception", "gns": False,
        "grad_accum_steps": 1, "lr": None, "mixed_precision": None, "name": "model",
        "num_workers": 8, "reset_ema": False, "resume": None, "resume_inference": None,
        "sample_n": 64, "save_every": 10000, "seed": None, "start_method": "spawn",
        "wandb_entity": None, "wandb_group": None, "wandb_project": None,
        "wandb_save_model": False,
    }  # fmt: skip
    args = vars(parse_args())
    assert {k: args[k] for k in published} == published
    # published without a value, which they now may have
    monkeypatch.setattr(sys, "argv", ["train.py", "--checkpointing", "--compile", "--config", "c"])
    assert (parse_args().checkpointing, parse_args().compile) == ("full", "model")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        parse_args()


def test_a_missing_package_is_named_with_its_remedy():
    assert need("json", "this") is __import__("json")
    with pytest.raises(ImportError, match=r'the log needs nosuch; .* pip install "k-diffusion\[tr'):
        need("nosuch.module", "the log")


def test_flags_that_do_not_go_together_have_argparses_exit_code(capsys, monkeypatch):
    @options.friendly_errors
    def main():
        raise options.UsageError("--a needs --b")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "train.py: error: --a needs --b\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes\nframe #0"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    ],
    ids=["python", "cpu", "cuda"],
)
def test_memory_that_runs_out_is_a_sentence(error):
    @options.friendly_errors
    def main():
        raise error

    with pytest.raises(
        SystemExit, match=r"there is not enough memory \(.*\); lower the batch size"
    ):
        main()


def test_other_errors_at_run_time_keep_their_traceback():
    @options.friendly_errors
    def main():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        main()


def test_memory_is_asked_before_it_is_taken(monkeypatch):
    assert memory.available() > 2**20
    monkeypatch.setattr(memory, "available", lambda: 3 * 2**30)
    memory.check(3 * 2**30, "the model", "make it smaller")
    with pytest.raises(
        ValueError, match=r"the model would take 4.0 GiB .* 3.0 GiB .*; make it smal"
    ):
        memory.check(4 * 2**30, "the model", "make it smaller")
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.check(2**80, "the model", "make it smaller")


def test_counting_a_model_draws_nothing(monkeypatch):
    from runs import tiny_config

    config = tiny_config()
    monkeypatch.setattr(memory, "available", lambda: 10_000_000)  # little enough to count
    torch.manual_seed(0)
    made = make_model(config).state_dict()
    torch.manual_seed(0)
    plain = parse(config).model.build(10).state_dict()
    assert all(torch.equal(made[k], plain[k]) for k in plain)


@pytest.mark.parametrize("several", [True, False])
def test_the_end_of_another_process_is_a_sentence(several, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: several)
    backend = torch.distributed.DistBackendError("Last error: remote process exited")
    for error in RuntimeError("pair.cc:553] Connection closed by peer [::1]:4"), backend:
        assert options.lost_peer(error) == several
    for error in RuntimeError("NCCL error: CUDA out of memory"), RuntimeError("shapes differ"):
        assert not options.lost_peer(error)

    @options.friendly_errors
    def main():
        raise RuntimeError("Connection reset by peer")

    with pytest.raises(SystemExit if several else RuntimeError, match="another process|reset by"):
        main()
