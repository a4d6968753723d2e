import subprocess
import sys

_HEAVY = ("torch", "feast", "faiss", "kafka", "duckdb", "pyarrow", "transformers", "torchrec")


def test_import_of_the_package_loads_nothing_heavy() -> None:
    program = "import sys, qarm_feast; print(*sys.modules)"

    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()

    assert [name for name in _HEAVY if name in loaded] == []


def test_import_of_the_package_takes_less_than_three_tenths_of_a_second() -> None:
    program = (
        "import time; start = time.perf_counter(); import qarm_feast;"
        "print(time.perf_counter() - start)"
    )

    seconds = min(
        float(
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    )

    assert seconds < 0.3
