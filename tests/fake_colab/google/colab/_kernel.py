"""The kernel that Colab starts; its configuration names this class."""

from google.colab._shell import Shell
from ipykernel.ipkernel import IPythonKernel


class Kernel(IPythonKernel):
    def _shell_class_default(self) -> type[Shell]:
        return Shell
