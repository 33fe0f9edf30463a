"""Forked kernels behave like kernels that were started."""

import asyncio
import os
import time

import nbformat
import pytest
from nbclient import NotebookClient

from tests.forked_kernels import forked_kernels
from tools import cookbook
from tools.execute import execute


def saved(folder, *sources):
    """Path of a notebook with these code cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "00_some.ipynb"
    cookbook.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def printed(execution):
    return "".join(output.text for cell in execution.notebook.cells for output in cell.outputs if output.output_type == "stream")


def test_folder_environment_and_libraries(forked, tmp_path):
    """The folder and environment that were asked for, libraries in memory, nothing of this repository."""
    look = (
        "import os, sys; print(os.getcwd(), os.environ['HERE'], 'torch' in sys.modules, 'clearml' in sys.modules, os.environ.get('GONE'))"
    )
    source = saved(tmp_path, look, "import tools")
    done = execute(source, tmp_path / "run", {**os.environ, "HERE": "there"})
    assert printed(done).split() == [str(tmp_path / "run"), "there", "True", "False", "None"]
    assert "No module named 'tools'" in done.error


def test_kernels_know_nothing_of_one_another(forked, tmp_path):
    source = saved(tmp_path, "import numpy as np; print(hasattr(np, 'mine')); np.mine = 1")
    assert [printed(execute(source, tmp_path / name)) for name in "ab"] == ["False\n", "False\n"]


def test_death_is_noticed(forked, tmp_path):
    assert "the kernel died" in execute(saved(tmp_path, "import os; os._exit(3)"), tmp_path / "run").error


def test_interruption_passes_on(forked, tmp_path):
    notebook = cookbook.read(saved(tmp_path, "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('stopped')"))
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=1, interrupt_on_timeout=True, resources={"metadata": {"path": tmp_path}}
    )
    start = time.perf_counter()
    client.execute()
    assert time.perf_counter() - start < 30
    assert notebook.cells[0].outputs[0].text == "stopped\n"


def test_a_kernel_ends_with_who_asked_for_it(forked, tmp_path):
    async def abandoned():
        notebook = cookbook.read(saved(tmp_path, f"import os; open({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid()))"))
        client = NotebookClient(notebook, kernel_name="python3")
        client.create_kernel_manager()
        await client.async_start_new_kernel()
        await client.async_start_new_kernel_client()
        await client.async_execute_cell(notebook.cells[0], 0)
        await client.km.signal_kernel(9)
        await client._async_cleanup_kernel()

    asyncio.run(abandoned())
    kernel = int((tmp_path / "id").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{kernel}"):
            return
        time.sleep(0.1)
    pytest.fail("the kernel lives on")


def test_where_the_system_cannot_fork_by_descriptor(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open")
    with forked_kernels(tmp_path) as variables:
        assert variables == {}
