"""Every planted fault is refused, every correct file passes, and errors are located where they start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gate_cases import CLASSIFIER, CORRECT, FASTER, LOCATED, Made, locations
from planted_faults import FAULTS, Fault

from coma.runtimes.model_spec import Preprocessing
from export.graphs.detector import OUTPUTS, Detector, recording
from export.verify.description import description_fault

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # torch.onnx warns of itself

QUICK = [fault for fault in FAULTS if fault.case is CLASSIFIER and "description" not in fault.about]
SLOW = [fault for fault in FAULTS if fault.case is not CLASSIFIER]


def refuse(fault: Fault, made: Made, folder: Path) -> None:
    result = made.judge(made.planted(fault.change, folder), fault.wrap)
    assert result.failures, fault.about


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.about)
def test_faults_of_a_classifier_are_refused(fault, made, tmp_path):
    refuse(fault, made(fault.case), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW, ids=lambda fault: f"{fault.case.name}: {fault.about}")
def test_faults_are_refused(fault, made, tmp_path):
    refuse(fault, made(fault.case), tmp_path)


def test_a_correct_file_passes_and_its_errors_are_located(made):
    case = made(CLASSIFIER)
    assert case.judge(case.file).failures == ()
    check_locations(case, count=10)


@pytest.mark.slow
@pytest.mark.parametrize("case", CORRECT, ids=lambda case: case.name)
def test_correct_files_pass(case, made):
    file = made(case)
    assert file.judge(file.file).failures == ()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in LOCATED if case is not CLASSIFIER], ids=lambda c: c.name)
def test_errors_are_located_where_they_start(case, made):
    check_locations(made(case), count=10)


def check_locations(made: Made, count: int) -> None:
    found = locations(made, count)
    assert len(found) == count
    for each in found:
        assert each.distance is not None and each.distance <= 1, each


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.about.startswith("description")], ids=lambda fault: fault.about
)
def test_every_field_of_the_description_is_compared(fault, made, tmp_path):
    case = made(fault.case)
    result = case.judge(case.planted(fault.change, tmp_path))
    assert result.images == 0 and result.failures[0].startswith("its description is wrong: ")


def test_a_description_names_the_fields_that_differ(made):
    spec = made(CLASSIFIER).reference.spec
    assert description_fault(spec, spec) is None
    rule: Preprocessing = replace(spec.preprocessing, std=(0.5, *spec.preprocessing.std[1:]))
    other = replace(spec, preprocessing=rule, class_names=("cat", "face", "cup", "dog"))
    assert description_fault(spec, other) == (
        "its description is wrong: preprocessing.std[0] is 0.5, not 0.24; class_names[1] is 'face', not "
        "'cup'; class_names[2] is 'cup', not 'face' and 1 more"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Faster R-CNN", "Mask R-CNN", "Cascade R-CNN", "RetinaNet"])
def test_steps_of_a_detector_start_from_what_is_given(name, made):
    module = made(replace(FASTER, model=name)).reference.module
    assert isinstance(module, Detector)
    images = torch.randn(2, 3, 96, 128)
    with torch.inference_mode():
        steps = module.steps(images)
        outputs = module(images)
        assert [*module.step_names()] == [step for step in steps if step not in OUTPUTS]
        again = module.steps(images, {name: value * 0.5 for name, value in steps.items() if "logits" in name})
        with recording(module) as names:
            recorded = module(images)
    for found, wanted in zip(recorded, [*outputs, *(steps[name] for name in names)], strict=True):
        assert torch.equal(found, wanted)
    first = next(name for name in steps if "logits" in name)
    assert torch.equal(again[first], steps[first])  # computed, not taken over
    assert not torch.equal(again["scores"], steps["scores"])
