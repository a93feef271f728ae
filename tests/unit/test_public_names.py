"""What users import is at the top of `trainer_client`."""

import subprocess
import sys

import trainer_client
from npu_wire import errors


def test_every_error_and_name_is_at_the_top() -> None:
    """Each class of the error tree, and each announced name, is there and is the real one."""
    tree = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert tree.items() <= {name: getattr(trainer_client, name) for name in trainer_client.__all__}.items()
    assert set(trainer_client.__all__) <= set(dir(trainer_client))
    assert trainer_client.prepare.__module__ == "trainer_client.qat.module"
    assert trainer_client.connect.__module__ == "trainer_client.npu.connection"


def test_importing_the_package_imports_neither_torch_nor_grpc() -> None:
    """Errors can be caught, and names completed, before anything heavy is there."""
    code = "import sys, trainer_client as t; dir(t); sys.exit(bool({'torch', 'grpc'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
