"""Execute a notebook in a folder of its own: the one way, for `make run`, `make render` and the tests."""

import asyncio
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import nbclient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.parameterize import parameterize_notebook
from tqdm import tqdm

from tools import cookbook

INJECTED = "injected-parameters"
PRETENDED_GPU = """
import sys
sys.path.insert(0, {root!r})
from tools import pretended_cuda
pretended_cuda.install()
sys.path.remove({root!r})
del sys, pretended_cuda
"""


@dataclass(frozen=True)
class Execution:
    """What came of a run.

    notebook: as far as it came; its copy lies in `folder`, beside what the notebook wrote. minutes: of all attempts.
    error: None, or the cell that failed, as "cell 3 (In [3]): ZeroDivisionError: division by zero".
    """

    notebook: NotebookNode
    folder: Path
    minutes: float
    error: str | None


def kernel_environment(**changes):
    """This process's environment with `changes`, for a kernel: COOKBOOK_DATA is absolute, by default our data/."""
    data = Path(os.environ.get("COOKBOOK_DATA") or cookbook.ROOT / "data")
    variables = {**os.environ, "COOKBOOK_DATA": str(data.resolve()), **changes}
    variables.pop("MPLBACKEND", None)  # Agg would drop the figures
    return variables


def read_json(path):
    """The value in a JSON file; None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_text(path, text):
    """Replace a file at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Clock:
    """Seconds that a run has taken, over all attempts; `path` keeps them from one attempt to the next."""

    def __init__(self, path):
        self.path = path
        self.before = float(path.read_text()) if path.exists() else 0.0
        self.start = time.perf_counter()

    def seconds(self):
        return self.before + time.perf_counter() - self.start

    def save(self):
        write_text(self.path, f"{self.seconds():.1f}")


def prepared(notebook, parameters):
    """The notebook without outputs; a cell behind the one tagged `parameters` sets `parameters`, {name: value}."""
    for cell in cookbook.code_cells(notebook):
        cell.outputs = []
        cell.execution_count = None
    if parameters:
        notebook.metadata["papermill"] = {}  # papermill notes the parameters there, and wants tags everywhere
        for cell in notebook.cells:
            cell.metadata.setdefault("tags", [])
        notebook = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
        del notebook.metadata["papermill"]
    return notebook


def is_injected(cell):
    return INJECTED in cell.metadata.get("tags", [])


def on_screen(line):
    """What a terminal shows of a line in which carriage returns go back to its beginning."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip(" ") if "\r" in line else shown


def resolve_carriage_returns(cell):
    """Leave of the text that a cell printed what a terminal shows in the end: one line of each progress bar."""
    streams = [output for output in cell.outputs if output.output_type == "stream"]
    for output in streams:
        output.text = "\n".join(map(on_screen, output.text.split("\n")))
    cell.outputs = [output for output in cell.outputs if output not in streams or output.text]


class Client(nbclient.NotebookClient):
    """nbclient's client, with a hidden first step, something to do after every cell, and interruptions that pass on."""

    index = None  # of the cell that runs

    async def run(self, prelude, after_cell, **launch):
        """Execute the code `prelude`, of which the notebook shows nothing, then the cells.

        launch: options of the kernel's process. Cells count from 1, as in the notebook itself, whatever the prelude
        does and whether there are injected parameters.
        """
        self.create_kernel_manager()
        try:
            await self.async_start_new_kernel(**launch)
            await self.async_start_new_kernel_client()
            if prelude:
                await self.execute_silently(prelude)
            for index, cell in enumerate(self.nb.cells):
                self.index = index
                if cell.cell_type == "code":
                    await self.execute_and_report(cell, after_cell)
        except DeadKernelError:
            if asyncio.current_task().cancelling():  # nbclient takes an interruption for the kernel's death
                raise asyncio.CancelledError from None
            raise
        finally:
            if self.km is not None:
                await self._async_cleanup_kernel()

    async def execute_silently(self, code):
        """RuntimeError where the code fails."""
        reply = await self.async_wait_for_reply(self.kc.execute(code, silent=True, store_history=False))
        content = reply["content"]
        if content["status"] != "ok":
            raise RuntimeError(f"{content.get('ename')}: {content.get('evalue')}")

    async def execute_and_report(self, cell, after_cell):
        try:
            await self.async_execute_cell(cell, self.index, store_history=not is_injected(cell))
        finally:
            if is_injected(cell):
                cell.execution_count = None
            resolve_carriage_returns(cell)
            after_cell()

    def place(self):
        """The cell that runs or failed, in words, counted as in the notebook without injected parameters."""
        if self.index is None:
            return "before the first cell"
        cells = [cell for cell in self.nb.cells[: self.index + 1] if not is_injected(cell)]
        executed = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
        return f"cell {len(cells) - 1} (In [{len(executed)}])"


def cause(failure):
    """What an exception of nbclient says, in words."""
    if isinstance(failure, CellExecutionError):
        return f"{failure.ename}: {failure.evalue}"
    if isinstance(failure, CellTimeoutError):
        return "TimeoutError: the cell took too long"
    if isinstance(failure, DeadKernelError):
        return "the kernel died, as it does when memory runs out; kernel.log may say more"
    return str(failure)


def tidy_up(folder, minutes, keep_checkpoints):
    """Leave of a run that went through its minutes in run.json, no log, and checkpoints only where they are wanted."""
    (folder / "kernel.log").unlink()
    (folder / "seconds.txt").unlink()
    if not keep_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    facts = read_json(folder / "run.json")
    if facts is not None:
        facts["minutes"] = round(minutes, 2)
        write_text(folder / "run.json", json.dumps(facts, indent=1, ensure_ascii=False))


def execute(
    source,
    folder,
    environment=None,
    parameters=None,
    pretended_gpu=False,
    timeout=None,
    keep_checkpoints=False,
):
    """Run the notebook at the path `source` in a kernel whose working directory is `folder`; returns an Execution.

    environment: of the kernel, kernel_environment() by default; COOKBOOK_PRESET in it sets the preset. parameters:
    {name: value} for the cell tagged `parameters`. pretended_gpu: with tools.pretended_cuda installed before the first
    cell. timeout: seconds that a cell may take.

    The executed copy lies in `folder` from the first cell on. A failed or interrupted run leaves the folder, with its
    checkpoints, so that the next one of the same code goes on there. A run that goes through deletes them, unless
    `keep_checkpoints`, so that a run that is made again measures again. KeyboardInterrupt passes on when the kernel is
    down.
    """
    source, folder = Path(source), Path(folder).resolve()
    variables = dict(kernel_environment() if environment is None else environment)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "results.json"):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    notebook = prepared(cookbook.read(source), parameters)
    clock = Clock(folder / "seconds.txt")
    client = Client(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        startup_timeout=120,
        iopub_timeout=60,  # a busy machine may be slow to send what a cell has printed
        coalesce_streams=True,
        record_timing=False,
    )
    prelude = PRETENDED_GPU.format(root=str(cookbook.ROOT)) if pretended_gpu else ""

    def save():
        cookbook.write(notebook, folder / source.name)
        clock.save()

    cells = len(cookbook.code_cells(notebook))
    with (
        (folder / "kernel.log").open("wb") as log,
        tqdm(total=cells, desc=source.stem, unit="cell", leave=False, disable=None) as bar,  # silent but on a terminal
    ):

        def after_cell():
            save()
            bar.update()

        try:
            asyncio.run(client.run(prelude, after_cell, env=variables, cwd=str(folder), stdout=log, stderr=log))
            error = None
        except (CellExecutionError, CellTimeoutError, RuntimeError) as failure:
            error = f"{client.place()}: {cause(failure)}"
        finally:
            save()
    minutes = clock.seconds() / 60
    if error is None:
        tidy_up(folder, minutes, keep_checkpoints)
    return Execution(notebook, folder, minutes, error)
