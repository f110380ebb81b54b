"""Errors a user can cause: one line that names the thing and the remedy, exit status 2."""

import functools
import signal
import sys

from util.run.causes import outside_cause

LONGEST = 2000  # characters of a message: what a damaged file says of itself may be any length


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, then the remedy."""


def one_line(message: str) -> str:
    """A message as it is printed: one line, not endless, and nothing in it that moves a terminal's cursor."""
    text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in " ".join(message.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def cli(main):
    """Decorate a script's `main()`: a UserError becomes one line on stderr and exit status 2.

    So do a disk that is full and a worker that was killed (`util.run.causes`); an interrupt becomes one line and status
    130. Any other exception is a fault of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # one that was raised in a data worker arrives with the worker's traceback before it
            _leave(str(error).rsplit("UserError: ", 1)[-1])
        except KeyboardInterrupt:
            _leave("interrupted", 128 + signal.SIGINT)
        except Exception as error:
            message = outside_cause(error)
            if message is None:
                raise
            _leave(message)

    return wrapped


def _leave(message: str, status: int = 2) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(status)
