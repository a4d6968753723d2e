import os
import subprocess
import sys

import pytest

# Ray reads the variable when it is imported, which only a process of its own has not done yet.
SAYS_WHETHER_RAY_HANDLES_UV = (
    "from qarm_feast.ray_tasks import RayTasks; RayTasks(int, 'a test'); "
    "from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV as handles_uv; "
    "print(handles_uv)"
)


@pytest.mark.parametrize(("word", "handles_uv"), [(None, "False"), ("1", "True")])
def test_ray_leaves_commands_under_uv_run_alone_unless_the_user_says_otherwise(
    word: str | None, handles_uv: str
) -> None:
    name = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    environment = {key: value for key, value in os.environ.items() if key != name}
    if word is not None:
        environment[name] = word

    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAYS_WHETHER_RAY_HANDLES_UV],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert said.split() == [handles_uv]
