"""In which order the test files run, and the shared fixtures of shared_fixtures.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
# before torch is: small operations on many threads wait for the slowest, on a busy machine most of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from xdist.scheduler import LoadFileScheduling

slow_files = "search figures report predict nsd trunk training stages prepare faults adapt".split()

pytest.register_assert_rewrite("shared_fixtures")


def pytest_configure(config):
    """Only where tests run: the process that hands them out would import torch for nothing, which takes seconds."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items):
    """Files that take long come first: else one process works on the last of them while the other has none left."""
    names = {item: item.path.stem.removeprefix("test_") for item in items}
    items.sort(key=lambda item: (*slow_files, names[item]).index(names[item]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one process, which builds their fixtures once; so do figures and report."""

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            name = super()._split_scope(nodeid)
            return {"test_report.py": "test_figures.py"}.get(name, name)

    return ByFile(config, log)
