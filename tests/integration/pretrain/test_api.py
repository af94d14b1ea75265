"""`coma.pretrain` and `coma.evaluate` with keywords: the flags of the commands, and the same refusals."""

from pathlib import Path

import pytest
from short_runs import rows

import coma
from coma.arguments import from_keywords
from coma.config.serialization import read_config
from coma.errors import BadInput
from pretrain.commands.pretrain import parse

SMALL = {
    **{"model": "tiny", "image_size": 32, "batch_size": 2, "device": "cpu", "workers": 0, "track": "none"},
    **{"model.dim": 8, "model.depths": (1, 1, 1, 1), "model.heads": (2, 2, 2, 2), "method": "mae"},
    **{"objective.decoder.dim": 8, "objective.decoder.depth": 1, "objective.decoder.heads": 2},
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reconstruction_sheet", "loss_curve"):
        monkeypatch.setattr(f"pretrain.training.run_directory.{name}", lambda *_, **__: None)


class Losses(coma.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])


def test_keywords_are_flags(labelled, tmp_path):
    losses = Losses()
    run = coma.pretrain(
        images=labelled / "train", out=tmp_path / "run", steps=2, log_steps=1, flip=False, **SMALL,
        callbacks=[losses],
    )  # fmt: skip
    flags = f"{labelled / 'train'} --out {run} --steps 2 --log-steps 1 --no-flip"
    words = [*flags.split(), *from_keywords(SMALL)]
    saved, asked = read_config(run), parse(words)[0]
    assert (saved.model, saved.objective, saved.optimizer) == (asked.model, asked.objective, asked.optimizer)
    assert saved.run == asked.run and not saved.data.flip
    assert losses.losses == [row["loss"] for row in rows(run)]
    assert coma.pretrain(resume=run, steps=3) == run
    assert rows(run)[-1]["step"] == 3

    scores = coma.evaluate(run / "artifact", data=labelled, protocols=("knn",), k=2, device="cpu", workers=0)
    assert [score.protocol for score in scores] == ["knn", "knn"]
    one = coma.evaluate([run / "artifact"], data=labelled, protocols=["knn"], k=2, random_baseline=False)
    assert [score.top1 for score in one] == [scores[0].top1]


def test_settings_in_one_object_are_taken_as_well(settings):
    assert coma.pretrain(settings) == settings.run.out
    assert coma.pretrain(settings, resume=True) == settings.run.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "coma pretrain has no setting epoch; did you mean epochs?"),
        ({"quite_other": 3}, "coma pretrain has no setting quite_other"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"epochs": "many"}, "--epochs 'many' must be a number"),
        ({"model": "tinny"}, "no model preset 'tinny'; there are: tiny, small"),
        ({"degrade": "blur"}, "--degrade blur belongs to --method beyond"),
        ({"resume": "elsewhere"}, "elsewhere: no such file; give a run directory"),
        ({"allow_changed_data": True}, "--allow-changed-data goes with --resume"),
        ({"out": ""}, "names no file or folder"),
        ({"init_partial": True}, "--init-partial: no effect without --init"),
        ({"probe_steps": 5, "probe_test": 9}, "--probe-steps, --probe-test: no effect without --probe"),
    ],
)
def test_keywords_are_refused_as_flags_are(tmp_path, capsys, settings, message):
    with pytest.raises(BadInput) as raised:
        coma.pretrain(images="PHOTOS", **({"out": tmp_path / "run"} | settings))
    assert message in str(raised.value)
    assert capsys.readouterr() == ("", "")


def test_settings_come_in_one_way_only(settings):
    with pytest.raises(BadInput, match=r"takes a PretrainConfig .* or keywords, not both"):
        coma.pretrain(settings, epochs=3)
    with pytest.raises(BadInput, match=r"takes a PretrainConfig .* or keywords, not both"):
        coma.pretrain(settings, resume=Path("run"))
    with pytest.raises(BadInput, match="coma evaluate has no setting protocol; did you mean protocols"):
        coma.evaluate("runs/first/artifact", data="CLASSES", protocol="knn")
    with pytest.raises(BadInput, match="give the images to train on"):
        coma.pretrain(out=settings.run.out)
