"""What a command prints and returns when it ends badly, and how a signal stops it."""

import errno
import signal
import subprocess
import sys

import pytest

from sit_jax.cli.main import StopSignal, entry_point, make_parser, parse_args
from sit_jax.errors import UserError


def end_of(raised, capsys):
    """Runs a command that raises; -> exit code, standard error."""

    def body():
        raise raised

    with pytest.raises(SystemExit) as end:
        entry_point(body)()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (UserError("--num 0: at least 1"), 2, "--num 0: at least 1"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "x: No space left"),
        (FileNotFoundError(errno.ENOENT, "No such file", "y"), 2, "y: No such file"),
        (OSError(errno.ESTALE, "Stale file handle", "z"), 1, "z: Stale file handle"),
        (TimeoutError("slow"), 1, "slow"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
    ids=["mistake", "disk", "file", "nfs", "network", "ctrl-c"],
)
def test_entry_point_ends_in_one_line(raised, code, line, capsys):
    found, err = end_of(raised, capsys)
    assert found == code and err.count("\n") == 1 and f": {line}" in err


def test_entry_point_lets_unexpected_errors_through():
    def body():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        entry_point(body)()


def test_entry_point_escapes_control_characters(capsys):
    _, err = end_of(UserError("a\x1b[2Jb"), capsys)
    assert "\\x1b" in err and "\x1b" not in err


@pytest.mark.parametrize("code", [0, 1, None])
def test_entry_point_returns_the_exit_code(code):
    with pytest.raises(SystemExit) as end:
        entry_point(lambda: code)()
    assert end.value.code == code


def parser():
    made = make_parser("A test.")
    made.add_argument("--labels", default="x")
    made.add_argument("--kind", choices=["a", "b"])
    return made


def test_parse_args_separates_overrides_and_expands_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/there")
    args, overrides = parse_args(parser(), ["--labels", "~/x", "--config.a.b=1"])
    assert args.labels == "/there/x" and overrides == ["--config.a.b=1"]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--lables", "x"], "unknown argument '--lables'; did you mean --labels?"),
        (["--label", "x"], "did you mean --labels?"),  # no abbreviations
        (["--labels", ""], "--labels is empty"),
        (["--kind", "c"], "--kind 'c' (one of"),
    ],
)
def test_parse_args_names_the_mistake(words, line):
    with pytest.raises(UserError) as refused:
        parse_args(parser(), words)
    assert line in str(refused.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_is_set_once_and_puts_handlers_back(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.is_set
        signal.raise_signal(number)
        assert stop.is_set and signal.getsignal(number) is before
        assert "stops after this step and saves it" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_stop_signal_lets_a_second_ctrl_c_interrupt():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


PROGRAM = """
import time
from sit_jax.cli.main import entry_point

@entry_point
def main():
    print("ready", flush=True)
    {body}

main()
"""


@pytest.fixture
def start():
    """Returns a started process of a command with that body, which is ready."""

    def start(body):
        command = [sys.executable, "-c", PROGRAM.format(body=body)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        assert process.stdout.readline() == "ready\n"
        return process

    return start


def test_ctrl_c_ends_a_process_with_130_and_one_line(start):
    process = start("time.sleep(30)")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "-c: interrupted; the same command goes on, or begins again\n"


@pytest.mark.parametrize(
    "body", ["while True: print('x' * 999)", "time.sleep(0.2); print('x')"]
)
def test_closed_standard_output_ends_a_process_without_a_word(start, body):
    process = start(body)
    process.stdout.close()
    assert process.wait(timeout=20) == 141
    assert process.stderr.read() == ""
