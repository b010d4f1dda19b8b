"""Commands as a user types them, and what a refusal must look like."""

from typer.testing import CliRunner, Result

from tempoquant.cli import app


def run(*arguments: object) -> Result:
    """Run one command line."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def split(flags: str) -> list[str]:
    """Split a command line into words."""
    return flags.split()


def assert_refused(result: Result, code: int, words: str) -> None:
    """Assert an exit code, one sentence on stderr, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
