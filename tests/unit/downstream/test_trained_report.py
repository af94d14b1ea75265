"""What `coma detect train` and `coma segment train` say at the end of a run."""

import json

import pytest

from downstream.commands.training import print_trained


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("best_coco_bbox_mAP_epoch_3.pth", "chosen by the val split: coco/bbox_mAP 0.5"),
        ("epoch_4.pth", "checkpoint: epoch_4.pth, the last one; --cfg-options default_hooks.checkpoint"),
    ],
)
def test_only_a_checkpoint_that_was_chosen_is_called_the_best(checkpoint, said, tmp_path, capsys):
    scores = {"coco/bbox_mAP": 0.5}
    trained = {"steps": 8, "checkpoint": checkpoint, "scores": scores, "last_scores": scores}
    (tmp_path / "config.json").write_text(json.dumps({"trained": trained}))
    print_trained("detect", tmp_path, tmp_path)
    shown = capsys.readouterr().out
    assert said in shown and ("best checkpoint" in shown) == checkpoint.startswith("best_")
