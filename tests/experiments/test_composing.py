"""A config is composed beside a job of Hydra's without a trace in what Hydra keeps for that job."""

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException

from kvarena.experiments.settings.compose import compose_cell, load_config


@pytest.fixture
def job(monkeypatch):
    """Hydra as it is while a job of its own runs."""
    kept, name = object(), JobRuntime.instance().get("name")
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", kept)
    JobRuntime.instance().set("name", "the job")
    yield kept
    JobRuntime.instance().set("name", name)
    GlobalHydra.instance().clear()


def test_a_job_of_hydra_s_stays_as_it_is(job):
    assert load_config(["allocator=radix"]).allocator.block_size == 16
    config, choices = compose_cell(["scheduler=static"])
    assert choices["scheduler"] == "static" and "hydra" not in config.values
    with pytest.raises(HydraException):
        load_config(["allocator=nonsense"])
    assert GlobalHydra.instance().hydra is job
    assert JobRuntime.instance().get("name") == "the job"
