"""The shell of a simulated Colab: it logs %pip and asks for secrets, and installs nothing."""

import os
from pathlib import Path

from ipykernel.zmqshell import ZMQInteractiveShell


def record(line: str) -> None:
    with Path(os.environ["FAKE_COLAB_LOG"]).open("a") as log:
        log.write(line + "\n")


class Shell(ZMQInteractiveShell):
    """huggingface_hub knows Colab by the module of this class."""

    def init_magics(self) -> None:
        super().init_magics()
        self.register_magic_function(lambda line: record(f"pip {line}"), magic_name="pip")
        # /content is a folder of the test: so is what Colab mounts below it.
        from medquad_utils import machine

        machine.DRIVE = Path(os.environ["FAKE_COLAB_CONTENT"]) / "drive" / "MyDrive"
