"""Writers: what TensorBoard and W&B show of a run, of one that was killed and goes on, and a service that is away."""

import sys
import types

import pytest

from hrf_fast.config.credentials import without_credentials
from hrf_fast.config.load import load_config
from hrf_fast.run.folder import RunFolder
from hrf_fast.run.session import Run
from hrf_fast.run.writers import build_writers
from tests.runs import train
from tests.unit.test_run import log, panel

pytestmark = pytest.mark.long


class Wandb(types.SimpleNamespace):
    """W&B as its documentation says: rows by a step that only rises, and a server that outlives the process.

    A row is (step, values); `lost` is how many of the last rows a kill takes before they are uploaded.
    """

    def __init__(self, offline=False):
        super().__init__()
        self.offline, self.rows, self.inits, self.metrics = offline, {}, [], []

    def Image(self, picture):
        return picture.size

    def init(self, **options):
        self.inits.append(options)
        rows = self.rows.setdefault(options["id"], [])
        # an offline run asks no server
        start = rows[-1][0] + 1 if rows and not self.offline else 0
        step = start

        def record(values, step, commit):
            nonlocal start
            assert commit and step >= start, "Step must only increase in log calls"
            start = step + 1
            rows.append((step, values))

        return types.SimpleNamespace(
            starting_step=step,
            offline=self.offline,
            define_metric=lambda name, **options: self.metrics.append((name, options)),
            log=record,
            finish=lambda: rows.append("finished"),
        )

    def series(self, name):
        (rows,) = self.rows.values()
        return [(row[1]["iteration"], row[1][name]) for row in rows if row != "finished" and name in row[1]]


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def words(tmp_path):
    return [f"run.folder={tmp_path / 'run'}", "run.progress=quiet", "run.writers=[wandb]"]


def live(words, done, iterations, *, killed=False):
    """One process of a run: the panel after each iteration, unless it is logged already."""
    with Run(load_config(words)) as run:
        run.begin(done)
        for iteration in range(done, iterations + 1):
            if not run.has_panel(iteration):
                run.log_panel(iteration, 0, panel())
            if iteration < iterations:
                log(run, iteration)
        if killed:
            # nobody hears of the end
            run._audience._writers.clear()


# --- W&B --------------------------------------------------------------------------------------------------------------


def test_wandb_shows_every_series_over_the_iteration_and_a_panel_is_one_record(words, wandb):
    live(words, 0, 2)
    assert wandb.metrics == [("iteration", {}), ("*", {"step_metric": "iteration"})]
    (rows,) = wandb.rows.values()
    assert [row if row == "finished" else (row[0], sorted(row[1])[:3]) for row in rows] == [
        (0, ["iteration", "panel", "panel/reward"]),
        (1, ["iteration", "reward_mean", "seconds/other"]),
        (2, ["iteration", "panel", "panel/reward"]),
        (3, ["iteration", "reward_mean", "seconds/other"]),
        (4, ["iteration", "panel", "panel/reward"]),
        "finished",
    ]
    assert wandb.series("panel/reward") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    # six images of 8 pixels in two columns and three rows, enlarged 8 times
    assert wandb.series("panel") == [(i, (128, 192)) for i in range(3)]
    assert wandb.series("reward_mean") == [(0, 0.5), (1, 0.5)]


@pytest.mark.parametrize("lost", [0, 1, 4])
def test_wandb_has_every_point_once_after_a_kill(words, wandb, lost):
    live(words, 0, 5, killed=True)
    (rows,) = wandb.rows.values()
    # what the process had not uploaded, and the checkpoint after 3 iterations
    del rows[len(rows) - lost :]
    live(words, 3, 6)
    assert wandb.series("reward_mean") == [(i, 0.5) for i in range(6)]
    assert wandb.series("panel/reward") == [(i, 1.0) for i in range(7)]
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_an_offline_wandb_run_repeats_nothing_either(words, wandb):
    wandb.offline = True
    live(words, 0, 5, killed=True)
    live(words, 3, 6)
    assert wandb.series("reward_mean") == [(i, 0.5) for i in range(6)]
    assert wandb.series("panel/reward") == [(i, 1.0) for i in range(7)]


def test_wandb_asked_for_in_the_middle_of_a_run_gets_its_beginning(words, wandb):
    live([*words, "run.writers=[]"], 0, 2)
    live(words, 2, 3)
    assert [iteration for iteration, _ in wandb.series("reward_mean")] == [0, 1, 2]
    assert [size for _, size in wandb.series("panel")] == [(128, 192)] * 4


def test_another_configuration_that_never_trained_is_another_wandb_run(words, wandb):
    live(words, 0, 0)
    live([*words, "train.group_size=9"], 0, 0)
    assert len(wandb.rows) == 2


def test_wandb_gets_the_configuration_and_no_credential(words, wandb):
    secrets = ["api_key", "hf_token", "password", "auth"]
    live([*words, *(f"reward.kwargs.{name}=hidden" for name in secrets), "reward.kwargs.keypoints=3"], 0, 0)
    (options,) = wandb.inits
    assert options["config"]["train"]["group_size"] == 5 and options["config"]["reward"]["kwargs"] == {"keypoints": 3}
    assert "hidden" not in str(options) and options["project"] == "hrf_fast" and options["name"] == "run"
    # a resume may raise train.iterations
    assert options["allow_val_change"] is True


def test_the_environment_names_wandbs_project_and_what_wandb_reads_itself_is_no_argument(words, wandb, monkeypatch):
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "mine")
    live(words, 0, 0)
    (options,) = wandb.inits
    assert options["project"] == "mine"
    # an argument would beat the environment
    assert not {"entity", "group", "tags"} & options.keys()


def test_the_names_that_secrets_have_are_credentials():
    secret = ("token", "X-Api-Key", "accessToken", "Authorization", "pwd", "api-key", "sig", "HF_TOKEN")
    secret += ("api_keys", "Cookie")
    shown = ("max_tokens", "keypoints", "author", "monkey", "design")
    assert without_credentials({"headers": dict.fromkeys((*secret, *shown), "x")})["headers"].keys() == {*shown}


def test_a_damaged_grid_holds_no_run_up(words, wandb, tmp_path):
    live(words, 0, 2)
    (grid, *_) = sorted((tmp_path / "run" / "samples").iterdir())
    grid.write_bytes(grid.read_bytes()[:100])
    # all that W&B has had is gone
    wandb.rows.clear()
    live(words, 2, 3)
    assert [i for i, _ in wandb.series("panel/reward")] == [0, 1, 2, 3]
    assert [i for i, _ in wandb.series("panel")] == [1, 2, 3]


def test_a_password_in_an_address_is_a_credential():
    config = {"terms": [{"kwargs": {"url": "https://me:secret@host/x?size=3&api_key=K&key=L#a", "max_tokens": 5}}]}
    address = "https://host/x?size=3&api_key=&key=#a"
    assert without_credentials(config) == {"terms": [{"kwargs": {"url": address, "max_tokens": 5}}]}


def test_wandb_that_does_not_start_says_how_to_log_in(words, wandb, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match="run.writers has wandb.*no API key.*wandb login"):
        live(words, 0, 0)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def scalars(run, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # all of them instead of a sample
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Images("panel")] == [e.step for e in events.Scalars("panel/reward")]
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("done", [0, 3])
def test_tensorboard_has_every_point_once_after_a_kill(words, tmp_path, done):
    words = [*words, "run.writers=[tensorboard]"]
    live(words, 0, 5, killed=True)
    live(words, done, 6)
    assert scalars(tmp_path / "run", "reward_mean") == [(i, 0.5) for i in range(6)]
    assert scalars(tmp_path / "run", "panel/reward") == [(i, 1.0) for i in range(7)]


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_writer_says_how_to_install_it(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    folder = RunFolder(load_config([f"run.folder={tmp_path}", f"run.writers=[{name}]"]))
    with pytest.raises(ImportError, match=rf"run.writers has {name}.*hrf_fast\[writers\]"):
        build_writers(folder)


# --- a service that is away -------------------------------------------------------------------------------------------


def test_a_writer_that_can_not_send_is_named_once_and_the_run_goes_on(tiny_run, tmp_path, wandb, monkeypatch, capsys):
    words = [*tiny_run, "evaluation.every=0", "run.writers=[wandb]"]
    calls = []

    def fail(self, *arguments, **options):
        calls.append(arguments)
        raise ConnectionError("the network is down")

    monkeypatch.setattr("hrf_fast.run.writers.WandbWriter.send", fail)
    assert train(words).reason == "train.iterations is 2"
    assert len(calls) == 1
    notes = [line for line in capsys.readouterr().out.splitlines() if "wandb failed" in line]
    assert len(notes) == 1 and "ConnectionError: the network is down" in notes[0]
    assert (tmp_path / "run" / "model").is_dir()
