# @title Experiment tracking with ClearML
# canon: tracking
import logging
import os
import sys
import threading

from clearml import Task
from clearml import config as clearml_config
from clearml.backend_api import Session

CLEARML_KEYS = ("CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY")
CLEARML_HOSTS = ("CLEARML_API_HOST", "CLEARML_WEB_HOST", "CLEARML_FILES_HOST")  # for a server of one's own


class Probe(Session):
    """A connection that is tried even while ClearML is offline."""

    _offline_mode = False


def colab_secret(name):
    """A secret of Colab's page; None where it is absent, not shared with this notebook, or no page is there to ask."""
    try:
        return sys.modules["google.colab"].userdata.get(name)
    except Exception:
        return None


def colab_credentials():
    """Put ClearML's keys from Colab's secrets into the environment, all of them or none; returns the names of those that lack."""
    if "google.colab" not in sys.modules or any(key in os.environ for key in CLEARML_KEYS):
        return []
    secrets = {name: colab_secret(name) for name in CLEARML_KEYS + CLEARML_HOSTS}
    lacking = [name for name in CLEARML_KEYS if not secrets[name]]
    if not lacking:
        os.environ.update({name: value for name, value in secrets.items() if value})
    return lacking if any(secrets.values()) else []


def connection_error():
    """Why no ClearML server can be used, in one line; None where one answers and takes the keys."""
    if os.environ.get("CLEARML_OFFLINE_MODE", "").lower() in ("1", "true", "yes", "on"):
        return "CLEARML_OFFLINE_MODE is set"
    lacking = colab_credentials()
    if lacking:
        return f"Colab's secrets lack {' and '.join(lacking)}"
    lacking = [name for name in CLEARML_KEYS if name not in os.environ]
    if len(lacking) == 1:
        return f"the environment lacks {lacking[0]}"
    try:
        Probe(http_retries_config={"total": 0})  # one try, where ClearML itself would make 240
        Session.get_app_server_host()  # Task.init() stops where the web server cannot be told
    except Exception as error:
        return str(error).strip().partition("\n")[0][:120]
    return None


def start_tracking(name, settings):
    """ClearML task `name` with the dict `settings`; a task that is still open is closed first.

    Online if a server takes the keys from the environment, Colab's secrets or ~/clearml.conf, which are looked up anew each
    time; else offline, in clearml/offline/ below the working folder, with a line that says why.
    """
    if Task.current_task():
        finish_tracking(Task.current_task(), patience=20)
    os.environ.setdefault("CLEARML_CACHE_DIR", "clearml")
    clearml_config.config_obj.set_config_impl(None)  # clearml.conf may have been written since it was last read
    clearml_config.config.clear_config_impl()
    in_process = {"sdk": {"development": {"report_use_subprocess": False}}}  # a process of its own takes seconds to close, or hangs
    clearml_config.config_obj.set_overrides(in_process)
    logging.getLogger("clearml.Repository Detection").setLevel("ERROR")  # it warns where no Jupyter server runs, as under papermill
    wished = os.environ.get("CLEARML_OFFLINE_MODE")
    error = connection_error()
    Task.set_offline(error is not None)
    if error:
        print("ClearML goes offline:", error)
    task = Task.init("cookbook", name, reuse_last_task_id=False, auto_connect_frameworks=False, auto_resource_monitoring=False)
    if wished is None:
        os.environ.pop("CLEARML_OFFLINE_MODE", None)  # ClearML leaves it there; the next start is to look anew
    task.connect(settings, name="config")
    return task


def log_curves(task, run, log, since=0):
    """Report the columns of `log`, lists beside log["step"], as curves of `run`, from index `since` on.

    A resumed run reports its saved log whole (since=0), so that its curves are complete.
    """
    logger = task.get_logger()
    for name in log.keys() - {"step"}:
        for step, value in list(zip(log["step"], log[name], strict=True))[since:]:
            logger.report_scalar(name, run, value, step)


def finish_tracking(task, patience=60):
    """Close the task; a server that has stopped answering is left behind after `patience` seconds."""
    closing = threading.Thread(target=task.close, daemon=True)
    closing.start()
    closing.join(patience)
    print("ClearML:", "the server has stopped answering, records may be lost" if closing.is_alive() else "task closed")
