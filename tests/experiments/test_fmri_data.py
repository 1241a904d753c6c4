"""Brain data: pickles that are programs, archives and folders of runs, made-up runs, windows and splits."""

import io
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy import signal, stats

from experiments.fmri import pickles, synthetic, windows
from experiments.fmri.folder import Folder
from experiments.fmri.release import Archives
from experiments.fmri.runs import Origin, Run
from experiments.fmri.samples import samples
from experiments.fmri.synthetic import Generated, Study

NETWORKS = 6
RNG = np.random.default_rng(0)


def volumes(count: int) -> np.ndarray:
    return RNG.normal(size=(count, NETWORKS)).astype(np.float32)


# pickles


def of_numpy_1(value: object) -> bytes:
    """As numpy 1 wrote it, under which the release was made."""
    content = pickle.dumps(value, protocol=2)
    assert b"numpy._core" in content
    return content.replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [volumes(3), np.float64(0.72), np.int64(7), 3, np.asfortranarray(volumes(4))])
def test_arrays_and_numbers_come_back(value, protocol):
    found = pickles.loads(pickle.dumps(value, protocol), "file")
    assert type(found) is type(value)
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("value", [volumes(3), np.float32(2), np.float64(0.72)])
def test_those_of_numpy_1_come_back(value):
    np.testing.assert_array_equal(pickles.loads(of_numpy_1(value), "file"), value)


class Program:
    """Pickled, a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (Program(eval, "1"), "builtins.eval"),
        (Program(os.system, "true"), "posix.system"),
        (Program(getattr, "a", "upper"), "builtins.getattr"),
        (np.array([Program(exec, "1")], dtype=object), "builtins.exec"),
        ({"a": [print]}, "builtins.print"),
        (np.load, "numpy.load"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_a_pickle_calls_is_refused_before_it_is_called(hostile, named, protocol):
    named = named if protocol > 2 else named.replace("builtins", "__builtin__")  # as Python 2 called it
    message = f"run.pyd: expected a pickle of a numpy array or number; got one that calls {named}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pickles.loads(pickle.dumps(hostile, protocol), "run.pyd")


def test_a_pickle_that_would_write_a_file_writes_none(tmp_path):
    hostile = pickle.dumps(Program(os.mkdir, str(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"calls posix\.mkdir"):
        pickles.loads(hostile, "run.pyd")
    assert not (tmp_path / "made").exists()
    pickle.loads(hostile)  # it would
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(volumes(9))[:-30], b"\x80\x04P1\n."])
def test_what_is_no_pickle_is_a_sentence(content):
    with pytest.raises(ValueError, match=r"^run\.pyd: expected a pickle of a numpy array or number; got "):
        pickles.loads(content, "run.pyd")


# archives


def archive(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return path


def trial(key: str, bold: object, label: int | None = None, *, part: str = "task_label") -> dict[str, bytes]:
    """A sample in the form of the release."""
    members = {f"{key}.bold.pyd": of_numpy_1(bold), f"{key}.t_r.pyd": of_numpy_1(np.float64(0.72))}
    if label is not None:
        members |= {f"{key}.task_name": b"rest", f"{key}.{part}.pyd": of_numpy_1(np.int64(label))}
    return members


def test_archives_are_read_sample_by_sample(tmp_path):
    signals = [volumes(5), volumes(7), volumes(3)]
    archive(tmp_path / "ds003/ds-ds003_sub-02_ses-1_task-rest_run-1.tar", trial("sub-02_a", signals[2]))
    archive(
        tmp_path / "ds002105/ds-ds002105_sub-01_task-a.tar",
        trial("trial_0", signals[0], 3) | trial("trial_1", signals[1], 4, part="label_across_tasks"),
    )
    runs = Archives(tmp_path, labelled=False)
    assert runs.origins == [
        Origin("ds002105", "01", "trial_0"),
        Origin("ds002105", "01", "trial_1"),
        Origin("ds003", "02", "sub-02_a"),
    ]
    for number in (2, 0, 1):
        np.testing.assert_array_equal(runs[number].bold, signals[number])
    assert [run.label for run in (runs[0], runs[1], runs[2])] == [3, 4, None]
    assert runs[1].t_r == 0.72
    with pytest.raises(ValueError, match=r"sub-02.*: expected sub-02_a\.task_label\.pyd or .*; neither is there"):
        Archives(tmp_path, labelled=True)


def test_an_archive_that_names_no_subject_is_one(tmp_path):
    archive(tmp_path / "HCP/one.tar", trial("a", volumes(3)))
    assert Archives(tmp_path, labelled=False).origins == [Origin("HCP", "one", "a")]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"a.bold.pyd": b""}, r"expected a\.t_r\.pyd beside a\.bold\.pyd; it is not there"),
        ({"a.t_r.pyd": b""}, r"expected a\.bold\.pyd beside a\.t_r\.pyd; it is not there"),
        ({"../a.bold.pyd": b""}, r"must hold paths below its own folder alone; got '\.\./a\.bold\.pyd'"),
        ({"/a.bold.pyd": b""}, r"must hold paths below its own folder alone; got '/a\.bold\.pyd'"),
    ],
)
def test_a_wrong_archive_is_a_sentence_when_it_is_opened(tmp_path, members, problem):
    path = archive(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? {problem}"):
        Archives(tmp_path, labelled=False)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"a.bold.pyd": pickle.dumps(eval)}, "a numpy array or number; got one that calls builtins.eval"),
        ({"a.bold.pyd": pickle.dumps("text")}, "a signal of real numbers, volumes by networks; got str"),
        (
            {"a.bold.pyd": pickle.dumps(np.ones(5))},
            r"a signal of real numbers, volumes by networks; got float64 \(5,\)",
        ),
        ({"a.bold.pyd": pickle.dumps(np.ones((5, 2), int))}, r"a signal of real numbers, .*; got int64 \(5, 2\)"),
        ({"a.bold.pyd": pickle.dumps(np.ones((0, 2)))}, r"a signal of real numbers, .*; got float64 \(0, 2\)"),
        ({"a.bold.pyd": pickle.dumps(np.full((5, 2), np.nan))}, "a finite signal; got nan"),
        ({"a.t_r.pyd": pickle.dumps("x")}, "a repetition time in seconds; got 'x'"),
        ({"a.t_r.pyd": pickle.dumps(-1.0)}, "a repetition time between 0 and 60 seconds; got -1.0"),
        ({"a.task_label.pyd": pickle.dumps(1.5)}, "a label, an integer; got '1.5'"),
        ({"a.task_label.pyd": pickle.dumps(-1)}, "a label of at least 0; got -1"),
    ],
)
def test_a_wrong_member_is_a_sentence_when_it_is_read(tmp_path, changes, problem):
    path = archive(tmp_path / "sub-1.tar", trial("a", volumes(5), 1) | changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: a\.[a-z_]+\.pyd: expected .*{problem}"):
        Archives(tmp_path, labelled=True)[0]


@pytest.mark.parametrize("kept", [0.5, 0.1, 0.0])
def test_a_truncated_archive_is_a_sentence(tmp_path, kept):
    path = archive(tmp_path / "a.tar", trial("a", volumes(100)) | trial("b", volumes(100)))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must be a whole tar archive; .*truncated"):
        Archives(tmp_path, labelled=False)


def test_a_folder_without_archives_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"^tar_dir must be a folder with .*athms/learning-from-brains, 13 GB"):
        Archives(tmp_path / "nowhere", labelled=False)


# folders of one's own


def folder(path: Path, table: str) -> Path:
    np.save(path / "a.npy", volumes(5))
    np.savez(path / "b.npz", bold=volumes(6), other=3)
    (path / "runs.csv").write_text(table)
    return path


def test_a_folder_is_read_by_its_table(tmp_path):
    table = "file,t_r,label,subject,dataset\nb.npz,2,1,anna,one\na.npy,0.8,0,ben,\n"
    runs = Folder(folder(tmp_path, table), labelled=True)
    assert runs.origins == [Origin("one", "anna", "b.npz"), Origin(tmp_path.name, "ben", "a.npy")]
    assert [(run.bold.shape, run.t_r, run.label) for run in (runs[0], runs[1])] == [((6, 6), 2, 1), ((5, 6), 0.8, 0)]
    least = Folder(folder(tmp_path, "file,t_r\na.npy,0.8\n"), labelled=False)
    assert (least[0].label, least.origins[0].subject) == (None, "a.npy")


@pytest.mark.parametrize(
    ("table", "labelled", "problem"),
    [
        ("file,label\na.npy,1\n", False, r"runs\.csv, line 1: expected the columns file,t_r; got 'file,label'"),
        ("file,t_r\na.npy,1\n", True, r"runs\.csv, line 1: expected the columns file,t_r,label"),
        ("file,t_r\n", False, r"runs\.csv: expected a line for each run; got a header alone"),
        (
            "file,t_r\na.npy,1\n../a.npy,1\n",
            False,
            r"line 3: expected a \.npy or \.npz file below it; got '\.\./a\.npy'",
        ),
        ("file,t_r\n/etc/passwd,1\n", False, r"line 2: expected a \.npy or \.npz file below it; got '/etc/passwd'"),
        ("file,t_r,label\na.npy,1,\n", True, "line 2: expected a label; got none"),
    ],
)
def test_a_wrong_table_is_a_sentence(tmp_path, table, labelled, problem):
    with pytest.raises(ValueError, match=problem):
        Folder(folder(tmp_path, table), labelled=labelled)


def test_wrong_files_of_a_folder_are_sentences(tmp_path):
    table = "file,t_r,label\nmissing.npy,1,0\na.npy,soon,0\na.npy,1,many\nzero.npy,1,0\nobjects.npy,1,0\nnone.npz,1,0\n"
    runs = Folder(folder(tmp_path, table), labelled=True)
    (tmp_path / "zero.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([Program(eval, "1")], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "none.npz", signal=volumes(3))
    for number, problem in enumerate(
        (
            r"missing\.npy: expected an array of numpy; got what cannot be read",
            r"a\.npy: expected a repetition time in seconds; got 'soon'",
            r"a\.npy: expected a label, an integer; got 'many'",
            r"zero\.npy: expected an array of numpy; got what cannot be read",
            r"objects\.npy: expected an array of numpy; got what cannot be read \(Object arrays cannot be loaded",
            r"none\.npz: expected an array of numpy; got what cannot be read",
        )
    ):
        with pytest.raises(ValueError, match=problem):
            runs[number]


def test_a_folder_without_a_table_says_what_it_should_hold(tmp_path):
    with pytest.raises(ValueError, match=r"^array_dir must be a folder with runs\.csv, whose header is file,t_r,label"):
        Folder(tmp_path, labelled=False)


# made-up runs

STUDY = Study(networks=8, tasks=3, subjects=4, runs=2, volumes=200, t_r=1.0)


def test_made_up_runs_are_standardised_and_have_no_slow_part():
    runs = Generated(STUDY)
    assert len(runs) == 24
    for number in range(len(runs)):
        bold, t_r, label = runs[number]
        assert (bold.shape, bold.dtype, t_r) == ((200, 8), np.float32, 1.0)
        np.testing.assert_allclose(bold.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(bold.std(0), 1, atol=1e-5)
        assert np.abs(np.fft.rfft(bold, axis=0)[:2]).max() < 1e-3  # below 0.008 Hz, of amplitudes about 10
        assert label == number // 2 % 3


def test_a_run_depends_on_the_study_and_its_number_alone():
    first, again = Generated(STUDY), Generated(STUDY)
    again[3]
    np.testing.assert_array_equal(first[7].bold, again[7].bold)
    assert not np.array_equal(first[7].bold, first[6].bold)
    assert not np.array_equal(
        first[7].bold,
        Generated(
            Study(
                seed=1,
                **{name: getattr(STUDY, name) for name in ("networks", "tasks", "subjects", "runs", "volumes", "t_r")},
            )
        )[7].bold,
    )


def test_the_haemodynamic_response_is_the_difference_of_two_gamma_densities():
    seconds = np.arange(0, 40, 0.25)
    expected = stats.gamma.pdf(seconds, 6) - stats.gamma.pdf(seconds, 16) / 6
    np.testing.assert_allclose(synthetic.haemodynamic_response(seconds), expected, atol=1e-15)  # measured 2e-16
    assert (synthetic.haemodynamic_response(np.array([-3.0, 0.0])) == 0).all()


def test_the_response_is_the_convolution_at_the_times_of_the_volumes():
    train = synthetic.events(np.random.default_rng(0), 120.0, 10.0)
    found = synthetic.response(train, 60, 2.0)
    direct = np.array(
        [
            sum(
                train[s] * synthetic.haemodynamic_response(np.array(t - s / 10))
                for s in range(len(train))
                if t - s / 10 < 32
            )
            for t in np.arange(60) * 2.0
        ]
    )
    np.testing.assert_allclose(found, (direct - direct.mean()) / direct.std(), atol=1e-9)


def test_events_last_a_second_and_keep_their_distance():
    train = synthetic.events(np.random.default_rng(1), 10_000.0, 8.0)
    onsets = np.flatnonzero(np.diff(train, prepend=0) == 1) / 10
    assert np.diff(onsets).min() >= 3.9  # on a grid of a tenth of a second
    assert np.diff(onsets).mean() == pytest.approx(8, rel=0.1)
    assert train.sum() == pytest.approx(10 * len(onsets), rel=0.01)


def test_slow_noise_has_a_power_inverse_to_the_frequency():
    noise = synthetic.slow_noise(np.random.default_rng(0), 1024, 400)
    frequency, power = signal.periodogram(noise, axis=0)
    slope = np.polyfit(np.log(frequency[4:400]), np.log(power.mean(1)[4:400]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)  # measured -1.00
    np.testing.assert_allclose(noise.std(0), 1)


def test_tasks_differ_in_their_pattern_and_without_a_signal_do_not():
    """By the network pairs that go together: which task has the most similar ones, trained on half of the subjects."""

    def right(signal: float) -> float:
        runs = Generated(Study(networks=12, tasks=3, subjects=12, runs=2, volumes=150, signal=signal))
        pairs = np.stack([np.corrcoef(runs[i].bold.T).ravel() for i in range(len(runs))])
        labels = np.array([runs[i].label for i in range(len(runs))])
        means = np.stack([pairs[:36][labels[:36] == task].mean(0) for task in range(3)])
        return float((np.square(pairs[36:, None] - means).sum(-1).argmin(1) == labels[36:]).mean())

    assert right(1.0) > 0.8
    assert right(0.0) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": 0}, "networks must be at least 1; got 0"),
        ({"tasks": 0}, "tasks must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"volumes": 7}, "volumes must be at least 8; got 7"),
        ({"t_r": 0.0}, "t_r must be from 0.1 to 10 seconds; got 0.0"),
        ({"signal": -1.0}, "signal must be at least 0 and finite; got -1.0"),
    ],
)
def test_a_study_says_what_it_expects(options, message):
    with pytest.raises(ValueError, match=rf"^{message}\.$"):
        Study(**options)


# pictures


def test_samples_come_from_what_a_folder_holds(tmp_path):
    made_up = samples(None, 3, 0)
    assert made_up.source.startswith("made up, not brains")
    assert [values.shape for values in made_up.values] == [(120, 64)] * 3
    assert all(", task " in label for label in made_up.labels)
    archive(tmp_path / "tars/ds-x_sub-1_task-y.tar", trial("a", volumes(5)))
    assert samples(tmp_path / "tars", 3, 0).labels == ["x, 1"]
    (tmp_path / "own").mkdir()
    found = samples(folder(tmp_path / "own", "file,t_r\na.npy,0.8\n"), 3, 0)
    assert (found.seconds, found.values[0].shape) == ([0.8], (5, 6))


# windows and splits


class Few:
    """Runs of these lengths."""

    def __init__(self, lengths: list[int], label: int | None = 1) -> None:
        self.runs = [Run(volumes(length), 2.0, label) for length in lengths]
        self.origins = [Origin("few", str(number), "run") for number in range(len(lengths))]

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, number: int) -> Run:
        return self.runs[number]


def test_windows_cover_every_volume_but_a_single_last_one():
    few = Few([10, 4, 9, 2])
    found = windows.Windows(windows.Selected(few, [0, 1, 2, 3], NETWORKS, 2), 4)
    assert [int(found[i]["lengths"]) for i in range(len(found))] == [4, 4, 2, 4, 4, 4, 2]
    np.testing.assert_array_equal(found[1]["bold"], few[0].bold[4:8])
    np.testing.assert_array_equal(found[2]["bold"], np.concatenate([few[0].bold[8:], np.zeros((2, NETWORKS))]))
    assert (found[2]["t_r"], found[2]["labels"]) == (2.0, 1)


def test_random_windows_lie_anywhere_within_a_run():
    run = Run(volumes(10), 2.0, None)
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(200):
        example = windows.random_window(run, 7, rng)
        starts.add(next(s for s in range(4) if np.array_equal(example["bold"], run.bold[s : s + 7])))
    assert starts == {0, 1, 2, 3}
    assert windows.random_window(run, 20, rng)["lengths"] == 10
    assert "labels" not in example


@pytest.mark.parametrize(
    ("few", "networks", "classes", "problem"),
    [
        (Few([5]), 7, None, "networks must be those of the data, 6 in few/0/run; got 7"),
        (Few([1]), 6, None, "few/0/run: expected at least 2 volumes; got 1"),
        (Few([5], label=4), 6, 4, "few/0/run: expected a label from 0 to 3; got 4"),
        (Few([5], label=None), 6, 4, "few/0/run: expected a label from 0 to 3; got None"),
    ],
)
def test_runs_that_do_not_fit_are_sentences(few, networks, classes, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        windows.Selected(few, [0], networks, classes)[0]


def test_runs_are_split_within_each_dataset():
    origins = [Origin("large", str(n), "run") for n in range(100)] + [Origin("small", str(n), "run") for n in range(5)]
    origins.append(Origin("single", "0", "run"))
    train, validation = windows.split_runs(origins, 0.05, seed=0)
    assert sorted(train + validation) == list(range(106))
    assert [sum(origins[n].dataset == name for n in validation) for name in ("large", "small", "single")] == [5, 2, 0]
    assert windows.split_runs(origins, 0.05, seed=0) == (train, validation)
    assert windows.split_runs(origins, 0.05, seed=1) != (train, validation)


def test_no_subject_is_in_two_splits():
    origins = [Origin("a", str(n // 3), f"run {n % 3}") for n in range(69)]
    splits = windows.split_subjects(origins, (0.13, 0.39), seed=0)
    assert [len(numbers) for numbers in splits] == [33, 9, 27]  # of 11, 3 and 9 subjects
    assert sorted([*splits[0], *splits[1], *splits[2]]) == list(range(69))
    subjects = [{origins[n].subject for n in numbers} for numbers in splits]
    assert len(subjects[0] | subjects[1] | subjects[2]) == 11 + 3 + 9
    with pytest.raises(ValueError, match="must have at least 3 subjects for training, validation and testing; got 2"):
        windows.split_subjects(origins[:6], (0.1, 0.1), seed=0)
