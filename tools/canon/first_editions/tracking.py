# canon: tracking
def start_tracking(name, settings):
    """ClearML task with the dict `settings`: online if a server takes the keys (environment, clearml.conf, Colab secrets), else offline."""
    if "google.colab" in sys.modules and "CLEARML_API_ACCESS_KEY" not in os.environ:
        with contextlib.suppress(Exception):  # no such secret, or no Colab page to ask for it
            for key in ("CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY", "CLEARML_API_HOST"):
                os.environ[key] = sys.modules["google.colab"].userdata.get(key)
    os.environ.setdefault("CLEARML_CACHE_DIR", "clearml")
    config_obj.set_overrides({"sdk": {"development": {"report_use_subprocess": False}}})  # a subprocess takes seconds to close, or hangs
    logging.getLogger("clearml.Repository Detection").setLevel("ERROR")  # it warns where no Jupyter server runs, as under papermill
    try:
        Session(http_retries_config={"total": 0})  # one try, where ClearML itself would make 240
    except Exception as error:
        Task.set_offline(True)
        print("ClearML goes offline:", str(error).splitlines()[0][:120])
    task = Task.init("cookbook", name, reuse_last_task_id=False, auto_connect_frameworks=False, auto_resource_monitoring=False)
    task.connect(settings, name="config")
    return task


def finish_tracking(task, patience=60):
    """Close the task; a server that has stopped answering is left behind after `patience` seconds."""
    closing = threading.Thread(target=task.close, daemon=True)
    closing.start(), closing.join(patience)
    print("ClearML:", "the server has stopped answering, records may be lost" if closing.is_alive() else "task closed")
