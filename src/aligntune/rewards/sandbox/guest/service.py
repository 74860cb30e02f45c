"""What does a long-lived helper do? Answer requests with one function of a library that was loaded beforehand.

Used for library code that works on untrusted text (math verification evaluates expressions): it gets the same
confinement as model-written code, and one that hangs is killed and forked anew.
"""

from __future__ import annotations

import importlib
import os

from . import wire


def main(channel: int) -> None:
    """The first frame names `module:function`; each later frame is its keyword arguments."""
    module, _, name = wire.receive(channel)["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    while True:
        try:
            arguments = wire.receive(channel)
        except wire.ProtocolError:
            os._exit(0)
        try:
            wire.send(channel, {"gives": function(**arguments)})
        except Exception as error:  # noqa: BLE001 - the caller makes it a RewardError with the sample
            wire.send(channel, {"raises": f"{type(error).__name__}: {error}"})
