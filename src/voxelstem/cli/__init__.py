"""The command line: each command parses little and calls one verb.

Results go to stdout, progress and errors to stderr. Exit codes: 0 all done, 2 wrong use or refused input,
3 finished but some items were refused, 130 stopped by the keyboard.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from voxelstem import __version__
from voxelstem.cli.data import export, ingest, samples, show
from voxelstem.cli.find import search
from voxelstem.cli.learn import adapt, demo, evaluate, predict, pretrain
from voxelstem.cli.weights import embed, models, weights
from voxelstem.errors import VoxelstemError
from voxelstem.terminal import DONE, INTERRUPTED, explain, tell

app = App(
    name="voxelstem",
    help="Foundation models for CT and MRI scans: from files to a pretrained, adapted and measured model.",
    version=__version__,
    default_parameter=Parameter(negative="", show_env_var=False),
)


def main(words: Sequence[str] | None = None) -> None:
    """Run one command line (the process's own by default) and end the process with its exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sys.exit(run(sys.argv[1:] if words is None else words))


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever the user can act on is told in one clear sentence."""
    try:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()  # here, where a full disk can still be told in words
    except CycloptsError as error:
        return tell(str(error), "`voxelstem COMMAND --help` shows an example")
    except VoxelstemError as error:
        return tell(error.problem, error.hint)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our answer (`| head`) has gone; without this, Python's last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        return tell(*explain(error))
    return code if isinstance(code, int) else DONE


# In the order of the journey, which is also the order of --help.
_JOURNEY = (samples, demo, ingest, show, export, models, weights, pretrain, embed, search, adapt, evaluate, predict)
for _place, _command in enumerate(_JOURNEY):
    if isinstance(_command, App):
        _command.sort_key = _place
        app.command(_command)
    else:
        app.command(_command, sort_key=_place)
