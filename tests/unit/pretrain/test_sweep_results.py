"""What a comparison counts and says: budgets, seconds, when a method catches up, captions, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from comparisons import SMALL, asked

from coma.artifact import load_encoder
from coma.config.compare import finetune_config
from coma.errors import BadInput
from coma.fonts import draw_figure
from pretrain.commands.compare import _device, entry, parse
from pretrain.sweep import Cost, Result, compare, groups, steps_for, sweep
from pretrain.sweep.caption import caption
from pretrain.sweep.jobs import slots
from pretrain.sweep.plan import check, last_step
from pretrain.sweep.plot import draw
from pretrain.sweep.results import (
    ProbePoint,
    TimeToTarget,
    classifier_run,
    mean_and_std,
    random_baseline_name,
    read_random_baseline,
    seconds_until,
    standard_error,
    time_to_target,
)


def test_budgets():
    cost = Cost(parameters=1, views=2, flops=5.0, seconds=0.01)
    assert steps_for("images", 1000, 10, cost) == 100
    assert steps_for("views", 1000, 10, cost) == 50
    assert steps_for("seconds", 60, 10, cost) == 600
    assert steps_for("flops", 1000, 10, cost) == 20
    assert steps_for("images", 104, 10, cost) == 10
    with pytest.raises(BadInput, match="--budget images 9: is less than a step of mae, which takes 10"):
        steps_for("images", 9, 10, cost, "mae")
    with pytest.raises(BadInput, match="--budget flops: cannot be counted"):
        steps_for("flops", 1000, 10, replace(cost, flops=None))


def test_seconds_of_log_points():
    logged = [
        {"step": 10, "images_per_s": 4.0},
        {"step": 20, "images_per_s": 8.0},
        {"step": 25, "cpu_s": 2.0},
    ]
    assert seconds_until(logged, 25, 4) == 10 + 5 + 10
    assert seconds_until(logged, 15, 4) == 12.5
    assert seconds_until(logged, 0, 4) == 0


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", 0),
        ('{"st', 0),
        ('{"step": 1, "loss": 2.0}\n', 1),
        ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', 1),
        ('{"step": 4, "loss": 2.0}\n{"step": 5, "probe_knn": 0.5}\n', 5),
        ("not read\n" * 10_000 + '{"step": 9, "loss": 2.0}\n{"step"', 9),
    ],
)
def test_how_far_a_run_is(tmp_path, text, step):
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(text)
    assert last_step(tmp_path) == step


@pytest.mark.parametrize(
    ("count", "visible", "names"),
    [
        (0, None, ()),
        (0, "", ()),
        (3, None, ("0", "1", "2")),
        (2, "2,5", ("2", "5")),
        (1, "2,-1,5", ("2",)),
        (2, "GPU-8932f937,GPU-2ae1b5f0", ("GPU-8932f937", "GPU-2ae1b5f0")),
        (1, "MIG-6e3b4b2c,MIG-0f1c6d3e", ("MIG-6e3b4b2c",)),  # CUDA sees the first alone
    ],
)
def test_gpus_are_those_that_cuda_sees(monkeypatch, count, visible, names):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _device("auto") == ("cuda" if count else "cpu", names)
    assert _device("cpu") == ("cpu", ())
    if not count:
        with pytest.raises(BadInput, match="--device cuda: this machine has no GPU"):
            _device("cuda")


def test_every_job_gets_a_gpu_or_threads(tmp_path):
    comparison = asked(tmp_path, tmp_path, jobs=3, threads=4)
    assert slots(comparison) == [{"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}] * 3
    both = slots(replace(comparison, device="cuda", gpus=("2", "5")))
    assert both == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5", "2")]
    assert len(slots(replace(comparison, device="cuda", gpus=("2", "5"), jobs=1))) == 1


@pytest.mark.parametrize(
    ("gpus", "flags", "shared"),
    [(0, [], (1, 80, 0)), (0, ["--jobs", "3"], (3, 26, 0)), (1, [], (1, 80, 32)), (8, [], (8, 10, 9))],
)
def test_jobs_share_the_cores_that_are_ours(labelled, tmp_path, monkeypatch, gpus, flags, shared):
    """Jobs, threads of each, processes that decode for each."""
    for module in ("pretrain.commands.compare", "coma.data.worker_pool"):
        monkeypatch.setattr(f"{module}.cores", lambda: 80)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    argv = [str(labelled / "train"), "--test", str(labelled), "--budget", "images", "8", *flags]
    found = parse([*argv, "--out", str(tmp_path)])
    assert (found.jobs, found.threads, found.workers) == shared


def test_when_a_method_reaches_the_reference():
    def runs(method: str, *curves: list[float]) -> list[Result]:
        points = [
            tuple(ProbePoint(100 * i, 1.0 * i, {"knn": value}) for i, value in enumerate(curve))
            for curve in curves
        ]
        return [
            Result(method, "m", i, 1, 1, 400, 400, 4.0, 1.0, 0.1, {"knn": 1.0}, curve=each)
            for i, each in enumerate(points)
        ]

    found = groups(
        runs("mae", [10, 20, 25, 30, 38], [10, 20, 25, 30, 42]) + runs("coma", [10, 40, 39], [10, 20, 30])
    )
    assert time_to_target(found[1], found[0], "knn", 1000) == TimeToTarget(40.0, (100,), (1.0,), 2, True)
    one, other = groups(runs("coma", [10, 40]) + runs("mae", [30, 20]))
    assert time_to_target(one, other, "knn", 1000) == TimeToTarget(20.0, (100,), (1.0,), 1, False)
    assert (
        time_to_target(found[1], None, "knn", 1000) is None
        and time_to_target(found[1], found[0], "linear", 1000) is None
    )
    assert standard_error(50, 1000) == pytest.approx(100 * np.sqrt(0.25 / 1000))  # binomial
    almost, _ = groups(runs("mae", [37.5, 40]) + runs("coma", [0, 0]))
    noisy, sure = (time_to_target(almost, almost, "knn", images) for images in (1000, 10_000))
    assert noisy and sure and (noisy.learned, sure.learned) == (False, True)  # 2.5 points: 1.6 errors, then 5
    assert mean_and_std([1.0, 3.0]) == "2.0 ± 1.4 (n = 2)"
    assert (mean_and_std([2.0]), mean_and_std([])) == ("2.0 (n = 1)", "")


def test_settings_that_cannot_be_compared_are_refused(labelled, tmp_path, capsys):
    argv = [str(labelled / "train"), "--test", str(labelled), "--budget", "images", "8", "--device", "cpu"]
    assert parse([*argv, "--methods", "mae", "zoom: beyond --degrade zoom-in"]).entries[1].method == "zoom"
    refused = [
        ([*argv, "--", "--seed", "3"], "--seed behind --"),
        ([*argv, "--", "--reconstruction-every=3"], "--reconstruction-every=3 behind --"),
        ([*argv, "--methods", "mae --seed 3"], "--seed in --methods 'mae --seed 3'"),
        ([*argv, "--models", "tiny --steps 3"], "--steps in --models"),
        ([*argv, "--protocols", "finetune", "--finetune", "--from-scratch"], "--from-scratch in --finetune"),
        ([*argv, "--methods", "nonsense"], "does not take"),
        ([*argv, "--", "--nonsense"], "does not take"),
        ([*argv, "--protocols", "finetune", "--finetune", "--nonsense 3"], "--finetune: coma classify train"),
        ([*argv, "--protocols", "--methods", "mae"], "at least one of each"),
        ([*argv, "--finetune-10", "--label-share 0.5"], "--label-share in --finetune-10"),
        ([*argv, "--protocols", "finetune-10", "--finetune-10", "--nonsense 3"], "does not take '--non"),
        ([*argv, "--lr-search", *"123456"], "--lr-search 1 2 3 4 5 6: give at most 5 different rates"),
        ([*argv, "--lr-search", "1", "1.0"], "--lr-search 1 1: give at most 5 different rates"),
        ([*argv, "--lr-search", "1", "1.0000000001"], "--lr-search 1 1: give at most 5 different rates"),
        ([*argv, "--lr-search", "0"], "--lr-search"),
        ([*argv, "--lr-search", "1", "--methods", "mae --base-lr 1"], "--base-lr beside --lr-search"),
        ([*argv, "--lr-search", "1", "--", "--base-lr=1"], "--base-lr=1 beside --lr-search"),
    ]
    for arguments, complaint in refused:
        with pytest.raises(BadInput, match=complaint):
            parse(arguments)
    capsys.readouterr()
    good = asked(labelled, tmp_path / "out")
    untaught = entry(labelled / "train", "cmt", "vit-tiny", ["--image-size", "16", "--batch-size", "4"], (0,))
    for changes, complaint in [
        ({"entries": good.entries * 2}, "would share one folder"),
        ({"reference": "cmt"}, "--reference cmt: is none of the methods: mae, coma"),
        ({"test": tmp_path / "nowhere"}, "no such file"),
        ({"entries": (replace(good.entries[0], seeds=(0, 0)),)}, "--seeds 0 0: one was given twice"),
        ({"entries": (replace(good.entries[0], method="random"),)}, "the table's name for untrained weights"),
        ({"entries": (good.entries[0], untaught)}, "--teacher-weights"),
        ({"out": labelled}, "is not empty and holds no comparison"),
    ]:
        with pytest.raises(BadInput, match=complaint):
            compare(replace(good, **changes))
    assert not (tmp_path / "out").exists()


def labelled_by_tables(labelled, folder, images=10**6, kind="label"):
    """A folder of train.csv and test.csv, with so many images of each class at most."""
    folder.mkdir()
    for split in ("train", "test"):
        paths = [
            path
            for label in (0, 1)
            for path in sorted((labelled / split / f"class{label}").iterdir())[:images]
        ]
        rows = [f"{path},{path.parent.name}" for path in paths]
        (folder / f"{split}.csv").write_text("\n".join([f"image,{kind}", *rows]))
    return folder


def test_labels_may_be_those_of_tables(labelled, tmp_path):
    comparison = asked(labelled, tmp_path / "out", test=labelled_by_tables(labelled, tmp_path / "tables"))
    check(comparison)
    sweep._check_data(comparison)
    assert "evaluated on 24 training and 12 test images" in caption(
        comparison, {each.name: Cost(1, 1, None) for each in comparison.entries}, []
    )


def test_labels_that_fine_tuning_cannot_use_are_refused_before_the_runs(labelled, tmp_path):
    few = labelled_by_tables(labelled, tmp_path / "few", 10)
    comparison = asked(labelled, tmp_path / "out", test=few, protocols=("finetune-10",))
    with pytest.raises(BadInput, match='take the last one \\(--finetune-10 "--hold-out 0"'):
        check(comparison)
    check(replace(comparison, finetune_10="--hold-out 0"))
    check(replace(comparison, protocols=("finetune",)))
    with pytest.raises(BadInput, match="any number of classes"):
        check(replace(comparison, test=labelled_by_tables(labelled, tmp_path / "tags", kind="tags")))


def started(comparison):
    """Returns a comparison with a planned run in its folder."""
    (comparison.out / "settings").mkdir(parents=True)
    (comparison.out / "settings" / "mae-tiny-0.json").touch()
    return comparison


def test_all_may_change_until_a_run_was_planned(labelled, tmp_path):
    comparison = asked(labelled, tmp_path / "out", budget=("images", 1))
    with pytest.raises(BadInput, match="less than a step"):
        compare(comparison)
    measured = comparison.out / "statistics-3.json"
    measured.write_text("[[0, 0, 0], [1, 1, 1]]")  # of other images
    comparison = replace(comparison, budget=("images", 2))
    with pytest.raises(BadInput, match="less than a step"):
        compare(comparison)
    assert json.loads(measured.read_text())[0] != [0, 0, 0]
    with pytest.raises(BadInput, match="other settings: budget"):
        compare(started(replace(comparison, budget=("images", 1))))


def test_flags_of_fine_tuning_may_change_until_they_were_used(labelled, tmp_path):
    comparison = asked(labelled, tmp_path / "out")
    sweep._open(comparison)
    started(comparison)
    for folder, refused in (
        (None, ()),
        ("finetuned", ("finetune",)),
        ("finetuned-10", ("finetune", "finetune_10")),
    ):
        if folder:
            (comparison.out / folder / "mae-tiny-0").mkdir(parents=True)
            (comparison.out / folder / "mae-tiny-0" / "config.json").touch()
        for number, setting in enumerate(("finetune", "finetune_10")):
            changed = replace(comparison, **{setting: f"--epochs {len(refused)}{number + 1}"})
            if setting in refused:
                with pytest.raises(BadInput, match=f"other settings: {setting} "):
                    sweep._open(changed)
            else:
                sweep._open(changed)
                comparison = changed


def test_pixels_are_normalised_as_weights_expect_and_by_channels(labelled, tmp_path):
    flags = [["--init", "tiny-64", "--image-size", "64"], ["--channels", "1", *SMALL], SMALL]
    found = tuple(entry(labelled / "train", "mae", "tiny", each, (0,)) for each in flags)
    given, grey, measured = (
        each.config.data for each in sweep._with_statistics(asked(labelled, tmp_path, entries=found)).entries
    )
    about = load_encoder("tiny-64").artifact
    assert (given.mean, given.std) == (about.mean, about.std)
    assert len(grey.mean or ()) == 1 and len(measured.mean or ()) == 3 and measured.mean != about.mean


def test_flags_of_a_method_win_over_those_of_all(labelled):
    argv = [str(labelled / "train"), "--test", str(labelled), "--budget", "images", "64", "--device", "cpu"]
    argv += ["--methods", "mae --base-lr 2e-3", "coma", "--", "--base-lr", "1e-3", "--batch-size", "32"]
    mae, coma = parse(argv).entries
    assert (mae.config.optimizer.base_lr, coma.config.optimizer.base_lr) == (2e-3, 1e-3)
    assert (mae.config.optimizer.batch_size, coma.config.optimizer.batch_size) == (32, 32)


def test_the_caption_tells_what_is_not_alike(labelled, tmp_path):
    """Rates, crops that are zoomed into, and teachers; 0.5 (1 - 0.5) of 6 test images."""
    names = [
        "mae --base-lr 1e-3",
        "zoom: beyond --degrade zoom-in --optimizer muon",
        "cmt --teacher runs/mae/artifact",
    ]
    found = tuple(entry(labelled / "train", name, "small: tiny", SMALL, (0,)) for name in names)
    comparison = asked(labelled, tmp_path, entries=found)
    text = caption(comparison, {each.name: Cost(1, 1, None) for each in found}, ["a run: exit code 1"])
    assert "4, AdamW, 1.56e-05, 0.2 to 1 of the area (mae --base-lr 1e-3 on small)" in text
    assert "; 4, Muon, " in text
    assert "centre of a crop: 25% (zoom, small) of its area" in text
    assert (
        "Taught: cmt --teacher runs/mae/artifact by artifact. No column includes the training of the teacher"
        in text
    )
    assert "**Missing:** a run: exit code 1" in text


def test_few_labels_have_flags_of_their_own(labelled, tmp_path, caplog):
    flags = {"finetune": "--epochs 2 --batch-size 8", "finetune_10": "--epochs 20"}
    found = asked(labelled, tmp_path, **flags)
    assert found.finetune_flags_of("finetune") == ("--epochs", "2", "--batch-size", "8")
    assert finetune_config(found.finetune_flags_of("finetune-10")).optimizer.epochs == 20
    text = caption(
        replace(found, protocols=("finetune", "finetune-10"), finetune=""),
        {each.name: Cost(1, 1, None) for each in found.entries},
        [],
    )
    assert "Flags: fine-tuned: none; fine-tuned, 10 % of labels: `--epochs 20`." in text
    check(replace(found, protocols=("finetune",)))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "--finetune-10: has no effect without --protocols finetune-10"
    ]


def test_fine_tuned_scores_are_those_of_the_classifier(labelled, tmp_path):
    """Top-1 on the test images, once they were used, and on the images that chose the checkpoint."""
    found = (entry(labelled / "train", "mae", "tiny", SMALL, (0,)),)
    comparison = asked(labelled, tmp_path, entries=found, protocols=("finetune", "finetune-10"))
    costs = {each.name: Cost(1, 1, None) for each in found}
    config = classifier_run(comparison, random_baseline_name(found[0], 0)) / "artifact" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"trained": {"val_top1": 0.75}}))
    assert read_random_baseline(comparison, found[0], 0, costs[found[0].name]) is None
    config.write_text(json.dumps({"trained": {"val_top1": 0.75, "test_top1": 0.5}}))
    baseline = read_random_baseline(comparison, found[0], 0, costs[found[0].name])
    assert baseline and (baseline.top1, baseline.validated) == ({"finetune": 50}, {"finetune": 75})
    few = classifier_run(comparison, random_baseline_name(found[0], 0), "finetune-10") / "artifact"
    few.mkdir(parents=True)
    (few / "config.json").write_text(json.dumps({"trained": {"val_top1": 0.25, "test_top1": 0.3}}))
    baseline = read_random_baseline(comparison, found[0], 0, costs[found[0].name])
    assert baseline and baseline.top1 == {"finetune": 50, "finetune-10": 30}
    assert baseline.validated == {"finetune": 75, "finetune-10": 25}


def test_the_picture_shows_everything_once_where_it_was_measured(labelled, tmp_path, monkeypatch):
    """A column for each backbone; a single run is hollow; probes apart from what was measured in the end."""
    shown = []
    monkeypatch.setattr(
        "pretrain.sweep.plot.draw_figure", lambda figure: [shown.append(figure), draw_figure(figure)][1]
    )
    curve = (ProbePoint(0, 0.0, {"knn": 10.0}), ProbePoint(400, 90.0, {"knn": 35.0}))
    results = [
        Result(method, model, seed, 1, 1, 400, 400, 120.0, 1.0, 0.1, {"knn": 40.0 + seed}, curve=curve)
        for method, model, seed in [("mae", "a", 0), ("mae", "a", 1), ("$^$", "a", 0), ("coma", "b", 0)]
    ]
    results.append(Result("random", "b", 0, 1, 0, 0, 0, 0.0, 0.0, None, {"knn": 20.0}))
    draw(asked(labelled, tmp_path), groups(results), tmp_path / "compare.png")
    (figure,) = shown
    axes = {each.get_title(): each for each in figure.axes}
    assert list(axes) == ["a: kNN", "b: kNN", "a: kNN, during training", "b: kNN, during training"]
    markers = [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]), line.get_markerfacecolor() == "none")
        for line in axes["a: kNN"].lines
        if line.get_marker() == "o"
    ]
    assert markers == [(2.0, 40.5, False), (2.0, 40.0, True)]
    assert [list(line.get_ydata()) for line in axes["b: kNN"].lines if line.get_linestyle() == "--"] == [
        [20, 20]
    ]
    assert [list(line.get_xdata()) for line in axes["a: kNN, during training"].lines] == [[0, 1.5]] * 3
    assert all(each.get_xlim()[1] == pytest.approx(2.1) for each in figure.axes)  # no marker is cut off
