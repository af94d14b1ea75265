"""`coma.classify`, `coma.embed` and `coma.export` with keywords: the results and refusals of the commands."""

import pytest
from export_files import backbone

import coma
from coma.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself
ON_CPU = {"device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return backbone(tmp_path_factory.mktemp("backbone") / "artifact")


def test_a_classifier_is_trained_tested_and_run(artifact, labelled, tmp_path, no_curves):
    out = tmp_path / "run"
    settings = {"data": labelled, "out": out, "steps": 1, "batch_size": 4, "image_size": 32, **ON_CPU}
    assert coma.classify.train(artifact, **settings, dry_run=True) is None
    assert not out.exists()
    result = coma.classify.train(artifact, **settings, track="none")
    assert result is not None and result.steps == 1 and result.artifact == out / "artifact"
    scores = coma.classify.test(result.artifact, data=labelled, **ON_CPU)
    assert scores["images"] == result.test.images
    assert scores["top1"] == pytest.approx(result.test.score)
    found = coma.classify.predict(result.artifact, labelled / "test", out=tmp_path / "found", **ON_CPU)
    assert len(found) == len(list(found)) == scores["images"]
    assert (tmp_path / "found" / "predictions.csv").is_file()


def test_features_are_written(artifact, labelled, tmp_path):
    info = coma.embed(artifact, labelled / "test", out=tmp_path / "features.npz", **ON_CPU)
    assert info is not None and info.count > 0 and not info.skipped
    assert (tmp_path / "features.npz").is_file()


@pytest.mark.slow
def test_files_are_exported(artifact, tmp_path):
    [path] = coma.export(artifact, out=tmp_path, shapes="1x3x32x32", benchmark_seconds=0, verify_images=2)
    assert path == tmp_path / "encoder.onnx" and path.is_file()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coma.classify.train("a", data="b", out="c", epoch=3), "did you mean epochs"),
        (lambda: coma.classify.test("a", data="b", splits="test"), "did you mean split"),
        (lambda: coma.classify.predict("a", ["b"], out="c", top_k=0), "--top-k 0 must be"),
        (lambda: coma.embed("a", "b", out="c.npz", stages=2), "did you mean stage"),
        (lambda: coma.export("a", precision="fp12"), "--precision"),
    ],
)
def test_keywords_are_refused_as_flags_are(call, message, capsys):
    with pytest.raises(BadInput) as raised:
        call()
    assert message in str(raised.value)
    assert capsys.readouterr() == ("", "")
