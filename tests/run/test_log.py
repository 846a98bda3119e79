"""The record of a run: a JSON object a line, in the log and in trackers."""

import json
from types import SimpleNamespace

from utils.run.log import RunLog


def test_a_record_of_the_log_and_its_trackers_hold_no_secrets(tmp_path):
    seen = []
    log = RunLog(SimpleNamespace(output_dir=tmp_path, log_jsonl=True))
    log.tracker = SimpleNamespace(log=seen.append)
    log.write({"update": 1, "note": "https://ann:hunter2@host.example/reward?name=x&api_key=p4r"})
    shown = {"update": 1, "note": "https://***@host.example/reward?name=x&api_key=***"}
    assert seen == [shown]
    assert json.loads((tmp_path / "training_log.jsonl").read_text()) == shown
