"""The Python API: what is public is there, documented and typed; frames say what the rows say; the tour runs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import advisor
import loadgen
import traces
from traces.errors import InputError
from traces.records import Fleet, Observations, Sample, Schedule

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", [traces, loadgen, advisor], ids=lambda p: p.__name__)
def test_every_public_name_is_there_documented_and_typed(package: ModuleType) -> None:
    """Each name of ``__all__`` imports, is in ``dir``, has a docstring of its own, and functions name all their types."""
    for name in package.__all__:
        held = getattr(package, name)
        assert name in dir(package)
        assert held.__doc__, name
        assert not isinstance(held, ModuleType), name
        if inspect.isfunction(held):
            signature = inspect.signature(held)
            assert signature.return_annotation is not inspect.Signature.empty, name
            for parameter in signature.parameters.values():
                assert parameter.annotation is not inspect.Parameter.empty, (name, parameter.name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("package", ["traces", "loadgen", "advisor"])
def test_the_type_checker_sees_the_same_names(package: str) -> None:
    """The names imported for type checkers are those that are published."""
    text = (ROOT / package / "__init__.py").read_text()
    typed = {line.rpartition(" as ")[2] for line in text.splitlines() if line.startswith("    from ")}
    assert typed == set(__import__(package).__all__)


def test_a_verb_is_the_function_whatever_was_imported_before() -> None:
    """``traces.ingest`` is callable before and after its submodule was imported; the submodule stays importable from."""
    code = (
        "import traces, loadgen, advisor, sys; assert 'sqlalchemy' not in sys.modules and 'sklearn' not in sys.modules;"
        "import traces.ingest; from traces.ingest import IngestReport; assert callable(traces.ingest), traces.ingest;"
        "from loadgen.replay import read_api_key; assert callable(loadgen.replay);"
        "from advisor import advise; assert advise is advisor.advise and callable(advise);"
        "from loadgen import engines, policy; assert sys.modules['loadgen.policy'] is policy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def rows() -> Observations:
    """Three requests: one whole, one without usage, one failed before a token."""
    held = Observations.empty(3)
    held.index[:] = [0, 1, 2]
    held.due_s[:] = [0.0, 1.0, 2.0]
    held.sent_s[:] = [0.0, 1.1, 2.0]
    held.first_token_s[:2] = [0.5, 1.5]
    held.last_token_s[:2] = [1.0, 2.5]
    held.requested_tokens[:] = 6
    held.output_tokens[0] = 6
    held.status[:] = ["ok", "ok", "failed"]
    held.error[2] = "reset"
    return held


def test_observations_as_arrow_and_pandas_say_what_numpy_says() -> None:
    """All columns and the derived ones; NaN times and counts of -1 are missing."""
    held = rows()
    columns = traces.to_numpy(held)
    assert set(columns) == {*Observations.columns(), "lag_s", "ttft_s", "ttft_sent_s", "tpot_s", "e2e_s", "e2e_sent_s"}
    table, frame = held.to_arrow(), held.to_pandas()
    assert table.column_names == list(frame.columns) == list(columns)
    assert table["ttft_s"].to_pylist() == [0.5, 0.5, None]
    assert table["output_tokens"].to_pylist() == [6, None, None]
    assert table["cached_tokens"].to_pylist() == [None] * 3
    assert table["error"].to_pylist() == ["", "", "reset"]
    assert frame["output_tokens"].isna().tolist() == [False, True, True]
    np.testing.assert_array_equal(frame["ttft_s"], columns["ttft_s"])
    assert frame.groupby("status")["e2e_s"].max()["ok"] == 1.5


def test_schedules_samples_and_runs_become_frames() -> None:
    """Columns of numbers where they are numbers, None is missing, records inside become text."""
    schedule = Schedule("t", np.arange(2), np.array([0.0, 1.0]), np.array([5, 6]), np.array([1, 2]))
    assert traces.to_arrow(schedule)["prompt_tokens"].to_pylist() == [5, 6]
    readings = [Sample(0.0, "p0", "prefill", waiting_requests=2.0), Sample(1.0, "d0", "decode")]
    assert traces.to_arrow(readings)["waiting_requests"].to_pylist() == [2.0, None]
    from tests.test_tool import a_run

    frame = traces.to_pandas([a_run(id=4, fleet=Fleet(1, 3))])
    assert frame.loc[0, "fleet"] == "1:3"
    assert frame.loc[0, "id"] == 4
    assert len(traces.to_pandas([])) == 0


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what to install."""
    for name, extra in (("pyarrow", "parquet"), ("pandas", "pandas")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            InputError, match=rf"{name} is not installed. Install it: pip install 'steelyard\[{extra}\]'"
        ):
            (traces.to_arrow if name == "pyarrow" else traces.to_pandas)(rows())


def test_the_notebook_shaped_tour_runs(tmp_path: Path) -> None:
    """docs/examples/tour.py from its first cell to its last, in an empty folder; it ends with a recommendation or the next
    measurement, and with rows of three runs."""
    script = ROOT / "docs" / "examples" / "tour.py"
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9754 requests" in done.stdout
    assert "pyarrow.Table" in done.stdout
    with traces.open_store(f"sqlite:///{tmp_path}/tour.db") as store:
        assert [len(store.observations(run.id)) for run in store.runs()] == [12, 30, 12]
    assert "Run " in done.stdout or "steelyard " in done.stdout
