from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdetr.annotations import findings
from msdetr.annotations.findings import CHECKS
from msdetr.cli.doctor import main
from msdetr.data.annotated_images import load_annotated_images

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


class CocoRoot:
    """A data set in COCO layout, healthy until something is planted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = {"images": [], "annotations": [], "categories": list(CATEGORIES)}
        (root / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (root / f"{split}2017").mkdir()
        for i in range(1, 4):
            self.add_image(i)
            self.add_annotation(i, bbox=[5, 6, 10, 12])

    @property
    def images(self) -> Path:
        return self.root / "train2017"

    @property
    def annotations(self) -> Path:
        return self.root / "annotations" / "instances_train2017.json"

    def add_image(self, image_id: int, **changes) -> Path:
        name = f"{image_id}.jpg"
        entry = {"id": image_id, "file_name": name, "width": 60, "height": 40}
        self.content["images"].append(entry | changes)
        rng = np.random.default_rng(image_id)
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.images / name)
        return self.images / name

    def add_annotation(self, image_id: int, **changes) -> int:
        annotation_id = len(self.content["annotations"]) + 1
        entry = {"id": annotation_id, "image_id": image_id, "category_id": 1}
        self.content["annotations"].append(entry | {"bbox": [1, 2, 20, 20]} | changes)
        return annotation_id

    def write(self) -> None:
        for split in ("train", "val"):
            path = self.root / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(self.content))

    def check(self, *options: str) -> tuple[int, dict]:
        """Exit status and report of the doctor for the training split."""
        self.write()
        report = self.root / "report.json"
        arguments = [str(self.root), "--split", "train", "--report", str(report), *options]
        status = main([*arguments, "--num-workers", "0"])
        (split,) = json.loads(report.read_text())["splits"]
        return status, split


@pytest.fixture
def root(tmp_path) -> CocoRoot:
    return CocoRoot(tmp_path / "set")


def refused(root: CocoRoot, *splits: str) -> list[str]:
    """The errors that training refuses, one line each."""
    folders = [root.root / f"{split}2017" for split in splits]
    files = [root.root / "annotations" / f"instances_{split}2017.json" for split in splits]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "_MAX_SHOWN", 1000)
        try:
            load_annotated_images(list(zip(folders, files, strict=True)))
        except ValueError as error:
            return [line.strip() for line in str(error).splitlines()[1:]]
    return []


def errors_of(report: dict) -> list[str]:
    """The errors of a report that concern annotations, one line each, as `refused` gives them."""
    of_files = {"missing_image", "unreadable_image", "wrong_size", "unsupported_mode"}
    return [
        f"{report['annotation_file']}: {findings.Finding(**finding)}"
        for finding in report["findings"]
        if finding.pop("severity") == "error" and finding["code"] not in of_files
        if finding.pop("cure")
    ]


def test_a_healthy_set(root, capsys):
    root.add_image(4)
    root.add_annotation(1, category_id=2, iscrowd=1)
    status, report = root.check()
    assert status == 0
    counts = {key: value for key, value in report.items() if key.startswith("num_")}
    assert counts == {
        "num_images": 4,
        "num_annotations": 4,
        "num_crowds": 1,
        "num_images_without_boxes": 1,
        "num_errors": 0,
        "num_warnings": 0,
    }
    assert report["class_histogram"] == {"cat": 3, "dog": 0}
    assert [(f["code"], f["image_id"]) for f in report["findings"]] == [("image_without_boxes", 4)]
    output = capsys.readouterr().out
    assert "4 images (1 without boxes), 4 annotations (1 crowds)" in output
    assert "0 errors, 0 warnings, 1 notes" in output


def test_a_name_that_no_terminal_can_show_is_escaped(root, capsys):
    root.content["images"][0]["file_name"] = "cut \ud83d.jpg"
    status, report = root.check()
    assert status == 1
    assert errors_of(report)
    assert "cut \\ud83d.jpg" in capsys.readouterr().out
    assert refused(root, "train")


def test_a_file_without_categories_is_refused_whatever_the_other_split_has(root):
    root.write()
    validation = root.root / "annotations" / "instances_val2017.json"
    validation.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    (error,) = refused(root, "train", "val")
    assert "instances_val2017.json: there are no categories" in error
    assert main([str(root.root), "--num-workers", "0"]) == 1


def test_training_logs_what_it_reads_differently(root, caplog):
    root.add_annotation(1, iscrowd="0", area="many")
    root.add_annotation(1, area="12.5")
    root.write()
    (images,) = load_annotated_images([(root.images, root.annotations)])
    assert sorted(images.table.areas.tolist()) == [12.5, 120.0, 120.0, 120.0, 400.0]
    text = caplog.text
    assert "instances_train2017.json: 1 of crowd_flag_text" in text
    assert "instances_train2017.json: 1 of malformed_area" in text


def plant_missing(root):
    root.add_image(9).unlink()


def plant_unreadable(root):
    root.add_image(9).write_text("not an image")


def plant_truncated(root):
    path = root.add_image(9)
    path.write_bytes(path.read_bytes()[:-600])


def plant_wrong_size(root):
    root.add_image(9, width=61)


def plant_rotated_size(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root.add_image(9, width=40, height=60)
    Image.new("RGB", (60, 40)).save(path, exif=exif)


def plant_float_pixels(root):
    path = root.add_image(9, file_name="9.tiff").with_suffix(".tiff")
    Image.fromarray(np.ones((40, 60), dtype=np.float32)).save(path)


def plant_parent_path(root):
    root.add_image(9, file_name="../9.jpg")


def plant_absolute_path(root):
    root.add_image(9, file_name=str(root.images / "1.jpg"))


def plant_escaping_link(root):
    path = root.add_image(9)
    path.rename(root.root / "outside.jpg")
    path.symlink_to(root.root / "outside.jpg")


def plant_image_without_size(root):
    root.add_image(9)
    del root.content["images"][-1]["width"]


def plant_image_that_is_a_number(root):
    root.content["images"].append(9)


def plant_image_of_no_height(root):
    root.add_image(9, height=0)


def plant_duplicate_image_id(root):
    root.add_image(9)
    root.add_image(9, file_name="1.jpg")


def plant_duplicate_annotation_id(root):
    root.add_annotation(1, id=2)


def plant_unknown_image(root):
    root.add_annotation(77)


def plant_unknown_category(root):
    root.add_annotation(1, category_id=5)


def plant_nan_box(root):
    root.add_annotation(1, bbox=[1, 2, float("nan"), 4])


def plant_infinite_box(root):
    root.add_annotation(1, bbox=[1, 2, float("inf"), 4])


def plant_short_box(root):
    root.add_annotation(1, bbox=[1, 2, 3])


def plant_box_of_huge_numbers(root):
    root.add_annotation(1, bbox=[1.5, 2, 10**400, 4])


def plant_huge_id(root):
    root.add_annotation(1, id=2**70)


def plant_no_box(root):
    root.add_annotation(1, bbox=None)


def plant_annotation_without_image(root):
    root.add_annotation(1)
    del root.content["annotations"][-1]["image_id"]


def plant_annotation_with_list_as_id(root):
    root.add_annotation(1, id=[1])


def plant_annotation_that_is_a_text(root):
    root.content["annotations"].append("?")


def plant_duplicate_category(root):
    root.content["categories"].append({"id": 1, "name": "cow"})


def plant_nameless_category(root):
    root.content["categories"].append({"id": 4})


def plant_degenerate_box(root):
    root.add_annotation(1, bbox=[5, 5, 0, 10])


def plant_negative_box(root):
    root.add_annotation(1, bbox=[5, 5, 10, -3])


def plant_box_over_the_edge(root):
    root.add_annotation(1, bbox=[50, 5, 15, 10])


def plant_box_outside(root):
    root.add_annotation(1, bbox=[70, 5, 15, 10])


def plant_file_listed_twice(root):
    root.add_image(9, file_name="1.jpg")


def plant_exif_rotation(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (60, 40)).save(root.add_image(9), exif=exif)


def plant_cmyk(root):
    Image.new("CMYK", (60, 40)).save(root.add_image(9))


def plant_sixteen_bits(root):
    path = root.add_image(9, file_name="9.png").with_suffix(".png")
    Image.fromarray(np.zeros((40, 60), dtype=np.uint16)).save(path)


def plant_grayscale(root):
    Image.new("L", (60, 40)).save(root.add_image(9))


def plant_crowd_flag_of_text(root):
    root.add_annotation(1, iscrowd="0")


def plant_unknown_crowd_flag(root):
    root.add_annotation(1, iscrowd="yes")


def plant_area_of_text(root):
    root.add_annotation(1, area="large")


PLANTS = [
    # fault, code of the finding, whether training refuses the annotation file
    (plant_missing, "missing_image", False),
    (plant_unreadable, "unreadable_image", False),
    (plant_truncated, "unreadable_image", False),
    (plant_wrong_size, "wrong_size", False),
    (plant_rotated_size, "wrong_size", False),
    (plant_float_pixels, "unsupported_mode", False),
    (plant_parent_path, "unsafe_file_name", True),
    (plant_absolute_path, "unsafe_file_name", True),
    (plant_escaping_link, "unsafe_file_name", False),
    (plant_image_without_size, "malformed_image", True),
    (plant_image_that_is_a_number, "malformed_image", True),
    (plant_image_of_no_height, "malformed_image", True),
    (plant_duplicate_image_id, "duplicate_image_id", True),
    (plant_duplicate_annotation_id, "duplicate_annotation_id", True),
    (plant_unknown_image, "unknown_image", True),
    (plant_unknown_category, "unknown_category", True),
    (plant_nan_box, "nan_box", True),
    (plant_infinite_box, "nan_box", True),
    (plant_short_box, "malformed_annotation", True),
    (plant_box_of_huge_numbers, "malformed_annotation", True),
    (plant_huge_id, "malformed_annotation", True),
    (plant_no_box, "malformed_annotation", True),
    (plant_annotation_without_image, "malformed_annotation", True),
    (plant_annotation_with_list_as_id, "malformed_annotation", True),
    (plant_annotation_that_is_a_text, "malformed_annotation", True),
    (plant_duplicate_category, "invalid_categories", True),
    (plant_nameless_category, "invalid_categories", True),
    (plant_unknown_crowd_flag, "malformed_annotation", True),
    (plant_crowd_flag_of_text, "crowd_flag_text", False),
    (plant_area_of_text, "malformed_area", False),
    (plant_degenerate_box, "degenerate_box", False),
    (plant_negative_box, "degenerate_box", False),
    (plant_box_over_the_edge, "box_outside", False),
    (plant_box_outside, "box_outside", False),
    (plant_file_listed_twice, "duplicate_file_name", False),
    (plant_exif_rotation, "exif_rotated", False),
    (plant_cmyk, "cmyk_image", False),
    (plant_sixteen_bits, "sixteen_bit_image", False),
    (plant_grayscale, "grayscale_image", False),
]


@pytest.mark.parametrize(("plant", "code", "is_refused"), PLANTS)
def test_every_planted_fault_is_found(root, plant, code, is_refused):
    plant(root)
    status, report = root.check()
    assert bool(refused(root, "train")) == is_refused
    result = [f for f in report["findings"] if f["code"] == code]
    assert len(result) == 1
    assert result[0]["severity"] == CHECKS[code].severity
    assert result[0]["cure"] == CHECKS[code].cure
    assert status == (CHECKS[code].severity == "error")
    assert status == 1 or not is_refused
    # Nothing else is wrong, except that a new image has no boxes and may be turned.
    expected = {code, "image_without_boxes", "exif_rotated"}
    assert {f["code"] for f in report["findings"]} <= expected
    # It says where.
    place = result[0]["file_name"], result[0]["image_id"], result[0]["annotation_id"]
    assert (
        any(place)
        or "categories" in result[0]["message"]
        or "not an object" in result[0]["message"]
    )


def test_every_code_is_planted():
    in_two_splits = {"image_without_boxes", "category_mismatch"}
    assert {code for _, code, _ in PLANTS} | in_two_splits == set(CHECKS)


def test_training_refuses_the_errors_of_both_splits(root, capsys):
    for plant, _, is_refused in PLANTS:
        if is_refused:
            plant(root)
    train = json.dumps(root.content)
    root.content["categories"][1] = {"id": 2, "name": "Dog"}
    root.write()  # and the categories of val differ
    root.annotations.write_text(train)
    report = root.root / "report.json"
    assert main([str(root.root), "--report", str(report), "--num-workers", "0"]) == 1
    splits = json.loads(report.read_text())["splits"]
    errors = [line for split in splits for line in errors_of(split)]
    assert len(errors) > 40
    assert refused(root, "train", "val") == errors
    output = capsys.readouterr().out
    assert "category 2 is 'Dog' here, but 'dog' in the label map" in output
    assert f"error: category_mismatch (1): {CHECKS['category_mismatch'].cure}" in output


def test_many_faults_at_once(root, capsys):
    for plant in (plant_truncated, plant_nan_box, plant_unknown_category, plant_degenerate_box):
        plant(root)
    for _ in range(5):
        plant_box_outside(root)
    status, report = root.check()
    assert status == 1
    assert (report["num_errors"], report["num_warnings"]) == (3, 6)
    output = capsys.readouterr().out
    assert "warning: box_outside (5)" in output
    assert "image 1, annotation 4, file 1.jpg: 'bbox' is [1, 2, nan, 4]" in output
    assert output.index("error: unreadable_image") < output.index("warning: degenerate_box")


def test_boxes_are_counted_as_training_does(root):
    plant_box_over_the_edge(root)
    plant_box_outside(root)
    plant_degenerate_box(root)
    root.add_annotation(2, category_id=2)
    _, report = root.check()
    assert report["class_histogram"] == {"cat": 4, "dog": 1}
    (dataset,) = load_annotated_images([(root.images, root.annotations)])
    assert dataset.labels.bincount().tolist() == [4, 1]


def test_a_box_may_leave_the_image_by_a_rounding(root):
    root.add_annotation(1, bbox=[-0.5, -1, 60.9, 41.5])
    assert root.check()[1]["findings"] == []


def test_exif_policy(root):
    plant_rotated_size(root)
    _, report = root.check()
    (finding,) = [f for f in report["findings"] if f["code"] == "wrong_size"]
    assert "the file is 60 x 40, the annotation file says 40 x 60" in finding["message"]
    assert "--data.exif apply" in finding["message"]
    status, report = root.check("--exif", "apply")
    assert status == 0
    assert {f["code"] for f in report["findings"]} == {"exif_rotated", "image_without_boxes"}


def test_label_layout(root):
    root.content["categories"].append({"id": 95, "name": "cow"})
    assert root.check()[0] == 0
    status, report = root.check("--label-layout", "coco")
    assert status == 1
    assert report["findings"][0]["code"] == "invalid_categories"


def test_both_splits_and_worker_processes(root, capsys):
    for i in range(4, 70):
        root.add_image(i)
    root.write()
    for path in root.images.iterdir():
        (root.root / "val2017" / path.name).write_bytes(path.read_bytes())
    (root.root / "val2017" / "55.jpg").write_text("broken")
    report = root.root / "report.json"
    assert main([str(root.root), "--num-workers", "2", "--report", str(report)]) == 1
    train, val = json.loads(report.read_text())["splits"]
    assert (train["num_errors"], val["num_errors"]) == (0, 1)
    assert [f["image_id"] for f in val["findings"] if f["severity"] == "error"] == [55]
    assert "instances_train2017.json" in capsys.readouterr().out


def test_explicit_paths(root):
    root.write()
    arguments = ["--images", str(root.images), "--annotations", str(root.annotations)]
    assert main(arguments) == 0
    plant_nan_box(root)
    root.write()
    assert main(arguments) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DATASET"),
        (["--images", "a"], "belong together"),
        (["a", "--images", "a", "--annotations", "b"], "either DATASET"),
        (["a", "--split", "test"], "split"),
        (["absent"], "train2017: the folder of the train images does not exist"),
        (["--images", ".", "--annotations", "absent.json"], "absent.json"),
    ],
)
def test_wrong_use_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    # The message may be wrapped in a frame.
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("text", ['{"images": [', "[]", '{"images": [], "annotations": []}'])
def test_files_that_cannot_be_checked_exit_with_2(root, text, capsys):
    root.write()
    root.annotations.write_text(text)
    with pytest.raises(SystemExit) as error:
        main([str(root.root)])
    assert error.value.code == 2
    assert str(root.annotations) in capsys.readouterr().err


def test_as_a_command(root):
    plant_missing(root)
    root.write()
    command = [sys.executable, "-m", "msdetr.cli.main", "doctor", str(root.root)]
    outcome = subprocess.run(
        [*command, "--split", "train"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert outcome.returncode == 1, outcome.stderr
    assert "error: missing_image (1)" in outcome.stdout
    assert outcome.stderr == ""


@pytest.mark.parametrize("name", ["coco64", "bccd"])
def test_real_data(shared_data, name):
    assert main([str(shared_data / name), "--num-workers", "0"]) == 0
