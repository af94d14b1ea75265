"""The number of classes in the settings of models of every kind."""

import logging

from downstream.tasks.class_counts import set_classes


def test_heads_that_tell_the_classes_apart_get_the_new_number_and_others_keep_theirs():
    model = {
        "rpn_head": {"num_classes": 1},
        "roi_head": {
            "bbox_head": [{"num_classes": 80}, {"num_classes": 80}],
            "mask_head": {"num_classes": 80},
        },
    }
    set_classes(model, 3)
    heads = model["roi_head"]
    assert [head["num_classes"] for head in heads["bbox_head"]] == [3, 3]
    assert heads["mask_head"]["num_classes"] == 3 and model["rpn_head"]["num_classes"] == 1


def test_weights_of_equal_classes_are_taken_over():
    head = {"num_things_classes": 4, "num_stuff_classes": 0, "loss_cls": {"class_weight": [1.0] * 4 + [0.1]}}
    set_classes({"panoptic_head": head, "panoptic_fusion_head": {"num_things_classes": 4}}, 2)
    assert head["num_things_classes"] == 2 and head["loss_cls"]["class_weight"] == [1.0, 1.0, 0.1]


def test_weights_of_classes_that_are_gone_are_dropped_and_said(caplog):
    losses = [{"class_weight": [0.8, 0.9, 1.1]}, {"class_weight": None}]
    model = {"decode_head": {"num_classes": 3, "loss_decode": losses}, "auxiliary_head": [{"num_classes": 1}]}
    with caplog.at_level(logging.INFO):
        set_classes(model, 11)
    assert losses[0]["class_weight"] is None and model["auxiliary_head"][0]["num_classes"] == 1
    assert "class_weight of 3 classes is dropped: the data have 11" in caplog.text
