"""Model references: what can't be had is one clear message."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from r1distill.data import models
from r1distill.data.errors import RequestError
from r1distill.data.models import HubModel

FETCH = """
import sys
from pathlib import Path
from r1distill.data.errors import R1DistillError
from r1distill.data.models import HubModel, materialise
try:
    print(sorted(file.name for file in materialise(HubModel(kind="hub", repo="owner/name"), Path(sys.argv[1])).iterdir()))
except R1DistillError as error:
    print(f"told: {error}")
"""


def test_a_download_that_breaks_off_goes_on_when_it_is_asked_for_again(hub, tmp_path):
    hub.add("models", "owner/name", {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.fail(r"(GET|HEAD) .*/resolve/.*/model", 403, times=99)
    told = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_reader",
    }

    def fetch() -> str:
        command = [sys.executable, "-c", FETCH, str(tmp_path)]
        return subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=True).stdout

    assert "told: the download of owner/name at" in (said := fetch()) and "run the same command again" in said
    hub.faults.clear()
    assert fetch() == "['config.json', 'model.safetensors']\n"
    assert hub.count("GET .*/resolve/.*/config.json") == 1


@pytest.mark.parametrize("repo", ["not a name", "owner/name/more"])
def test_what_is_no_repositorys_name_is_told(repo):
    with pytest.raises(RequestError, match=f"'{repo}' is no name of a model on the Hub"):
        models.revision(HubModel(kind="hub", repo=repo))
