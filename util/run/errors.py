"""Errors a user can cause: one line that names the thing and the remedy, exit status 2."""

import functools
import sys


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, then the remedy."""


def cli(main):
    """Decorate a script's `main()`: a UserError becomes one line on stderr and exit status 2.

    Any other exception is a fault of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # one that was raised in a data worker arrives with the worker's traceback before it
            message = str(error).rsplit("UserError: ", 1)[-1]
            print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
