"""What names of files and folders mean by themselves: images, left-overs of systems and programs, splits, copies.

Whole words of a name are compared, never parts of words: `trainer`, `valley` and `test tube` are classes.
"""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import PurePosixPath

from midway.gen.core.errors import DataError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".jpg_large", ".jpg-large", ".jpg:large", ".mpo"),
    *(".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".avif", ".heic", ".heif"),
)
"""Endings of the formats that are decoded, in lower case; `jpg_large` and its like are how Twitter's photos were saved."""

_PLAIN = re.compile(r"(?:[\w -][\w .-]*/)*[\w -][\w .-]*", re.ASCII)  # nothing to do; there may be millions
_LIBRARIES = (
    ".photoslibrary",
    ".photolibrary",
    ".migratedphotolibrary",
    ".aplibrary",
    ".lrdata",
    ".lrlibrary",
    ".cocatalog",
)
"""Folders of Photos, iPhoto, Aperture, Lightroom and Capture One: originals beside their previews and thumbnails."""
_JUNK = {
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "_vti_cnf"),
    *("@eadir", "#recycle", "#snapshot", "@tmp"),  # Synology
    *("@recycle", "@recently-snapshot", "@__thumb"),  # QNAP
    *("lost+found", "thumbnails", "picasa.ini", "zbthumbnail.info", "ipod photo cache"),
}
_SPLITS = {
    *("train", "training", "trn", "trainval", "test", "testing", "tst", "val", "valid", "validation", "minival", "dev"),
    *("eval", "evaluation", "heldout", "holdout", "pred", "prediction", "predictions", "unlabeled", "unlabelled"),
    *("labeled", "labelled", "query", "gallery", "trainings", "entrenamiento", "prueba", "entrainement", "treino"),
    *("teste", "训练", "训练集", "测试", "测试集", "验证", "验证集", "学習", "テスト", "検証"),
}
_NEUTRAL = {
    *("set", "sets", "split", "splits", "subset", "data", "dataset", "datasets", "image", "images", "img", "imgs"),
    *("picture", "pictures", "photo", "photos", "sample", "samples", "folder", "dir", "part", "seg", "crop", "crops"),
    *("cropped", "resized", "multiple", "all", "full", "bounding", "box", "public", "private", "and", "batch", "daten"),
}
"""Words that make no class of the name of a split: seg_train, train_images, test-multiple, bounding_box_test."""
_JOINED = re.compile(f"({'|'.join(_SPLITS)})({'|'.join(_NEUTRAL)})|({'|'.join(_NEUTRAL)})({'|'.join(_SPLITS)})")
_UNSURE = {
    *("valid", "dev", "eval", "evaluation", "pred", "prediction", "predictions", "query", "gallery"),
    *("labeled", "labelled", "unlabeled", "unlabelled"),
}
"""Words of splits that are classes too (valid and invalid papers): alone among folders they are a split if folders are inside."""
_VEHICLES = {
    *("bus", "car", "truck", "van", "bicycle", "bike", "motorcycle", "motorbike", "tram", "streetcar", "subway"),
    *("tractor", "boat", "ship", "ferry", "airplane", "aeroplane", "plane", "helicopter", "automobile"),
}
"""Classes beside which `train` is one too, as in CIFAR-100 and COCO."""
_IMAGES = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures"}
_VERSIONS = {
    *("original", "originals", "augmented", "raw", "processed", "preprocessed", "small", "large", "thumb", "thumbs"),
}
"""Words that with those of `_NEUTRAL` name versions of one set: `images` beside `resized`, `Augmented Images`."""
_IMAGE_FOLDERS = {"image", "images", "img", "imgs", "jpegimages", "rgb"}
_ANNOTATION_FOLDERS = {
    *("mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations"),
    *("segmentationclass", "segmentationobject", "gt", "groundtruth", "ground_truth", "trimaps", "depth"),
}
_COPIED = "copy|kopie|copie|copia|cópia|kopia|копия|コピー|副本|backup|bak"
_COPY = re.compile(
    r"(.+?) ?\(.*conflicted copy.*\)"
    rf"|(?:{_COPIED}) (?:\(\d+\) )?(?:of|von|de|di) (.+)"
    rf"|(.+?)(?: - |[ _.-])(?:{_COPIED})(?:[ _-]?\(?\d+\)?)?"
    r"|(.+?) ?\(\d+\)|(.+?)~",
    re.IGNORECASE,
)
"""How systems name a copy: Copy of X, X - Copy (2), X copy 2, X (1), X~, X.bak, and in other languages."""


def canonical(name: str, windows: bool = True) -> str:
    """The name with "/" between its parts, in Unicode's composed form, and relative; of `windows`, a backslash divides too.

    DataError for one that leaves its folder by `..`.
    """
    if _PLAIN.fullmatch(name):
        return name
    composed = unicodedata.normalize("NFC", name)
    divided = _relative(composed.replace("\\", "/"))
    if divided.startswith("../") or divided == "..":
        why = "a name with `..` belongs to no folder here"
        raise DataError(f"{name} lies outside of its source", why, "pack the images from inside their folder")
    return divided if windows else _relative(composed)


def _relative(name: str) -> str:
    return posixpath.normpath(re.sub(r"^[A-Za-z]:(?=/)", "", name).lstrip("/"))


def of_windows(names: Iterable[str]) -> bool:
    """Whether backslashes in these names are between folders: if no other folder is among the names of images.

    A name may hold a backslash on Linux. Where a zip of Windows is unpacked, all files are in one folder.
    """
    return len({posixpath.dirname(name) for name in names if is_image(name) and junk(name) is None}) == 1


def is_image(name: str) -> bool:
    """Whether a name ends like an image that can be decoded."""
    return name.lower().endswith(EXTENSIONS)


def is_library(name: str) -> bool:
    """Whether a folder is a library of photo software."""
    return name.casefold().endswith(_LIBRARIES)


def junk(name: str) -> str | None:
    """The part of a name by which it is a left-over of a system or a program, as it is listed; None of any other name."""
    for part in name.split("/"):
        if part.startswith("._"):  # macOS writes one beside each file
            return "._*"
        if part.startswith(".") or part.casefold() in _JUNK or is_library(part):
            return part
    return None


def ending(name: str) -> str:
    """The extension of a name, as it is listed."""
    return PurePosixPath(name).suffix or "no extension"


def without_wrapper(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The parts of each name without folders that all share, as long as a folder remains below."""
    parts = [PurePosixPath(name).parts for name in names]
    depth = min(len(posixpath.commonprefix(parts)), min(map(len, parts), default=2) - 2)
    return [part[max(depth, 0) :] for part in parts]


# ---- names of folders ----


def _words(name: str) -> tuple[str, ...]:
    """`TrainSet2` and `trainset2` -> train, set, 2."""
    name = re.sub(r"(?<![a-z])(held|hold)[ _-]out(?![a-z])", r"\1out", name, flags=re.IGNORECASE)
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)", " ", name)
    words = [word.casefold() for word in re.findall(r"[^\W_]+", spaced)]
    return tuple(part for word in words for part in _parts_of_word(word))


def _parts_of_word(word: str) -> list[str]:
    joined = None if word in _SPLITS else _JOINED.fullmatch(word)
    return [word] if joined is None else [part for part in joined.groups() if part]


def splits_among(folders: Sequence[str], nested: Collection[str] = ()) -> list[str]:
    """Those that are splits by their names, of which `nested` hold folders themselves.

    A split is named by words of splits alone (seg_train), or alike another but for such a word (letters_train, letters_test),
    or beside others that all have such a word (train_new, valid).
    """
    pure, alike = dict[str, set[str]](), defaultdict[tuple[str, ...], dict[str, set[str]]](dict)
    for folder in folders:
        words = _words(folder)
        split, rest = {word for word in words if word in _SPLITS}, tuple(word for word in words if word not in _SPLITS)
        if split and all(word in _NEUTRAL or word.isdigit() or len(word) == 1 for word in rest):
            pure[folder] = split
        elif split:
            alike[rest][folder] = split
    pairs = [folder for same in alike.values() if len(set(map(frozenset, same.values()))) > 1 for folder in same]
    found = {folder: split for same in (pure, *alike.values()) for folder, split in same.items()}
    if len(found) == len(folders) and len(set(map(frozenset, found.values()))) > 1:
        return sorted(found)
    if len(pure) == 1 and not pairs and _is_class(next(iter(pure)), folders, nested):
        return []
    return sorted([*pure, *pairs])


def _is_class(only: str, folders: Sequence[str], nested: Collection[str]) -> bool:
    """Whether the only folder that is named like a split is a class after all: the vehicle, or a word of both."""
    if only in nested:
        return False
    vehicles = only.casefold() == "train" and _VEHICLES & {folder.casefold() for folder in folders}
    return bool(vehicles) or _UNSURE.issuperset(_words(only))


def copies_among(folders: Sequence[str]) -> list[tuple[str, str]]:
    """(copy, original) of those that are named as copies of another: `cat - Copy` or `cat (1)` beside `cat`."""
    known = {folder.casefold(): folder for folder in folders}
    found = [(folder, match) for folder in folders if (match := _COPY.fullmatch(folder))]
    originals = [(folder, known.get(next(filter(None, match.groups())).casefold())) for folder, match in found]
    return [(folder, original) for folder, original in originals if original is not None]


def annotations_among(folders: Sequence[str]) -> list[str]:
    """Those that hold annotations of the images in another: `masks` beside `images`."""
    folded = {folder.casefold(): folder for folder in folders}
    if not _IMAGE_FOLDERS & folded.keys():
        return []
    return sorted(folder for name, folder in folded.items() if name in _ANNOTATION_FOLDERS)


def versions_among(folders: Sequence[str]) -> list[str]:
    """All, if they are versions of one set by their names: `images` and `resized`, `Original Images` and `Augmented Images`."""
    words = [[word for word in _words(folder) if not word.isdigit()] for folder in folders]
    known = _NEUTRAL | _VERSIONS
    whole = len(folders) > 1 and all(each and known.issuperset(each) for each in words)
    return sorted(folders) if whole and any(_IMAGES.intersection(each) for each in words) else []


def one_on_windows(folders: Iterable[str], case: bool = False) -> list[str]:
    """The first of those that Windows takes for one: they differ in spaces and dots at their ends, or also in `case`.

    Words are meant, so that `a` and `A` are classes of letters.
    """
    same = defaultdict[str, list[str]](list)
    for folder in folders:
        same[folder.rstrip(" .").casefold() if case else folder.rstrip(" .")].append(folder)
    return next((names for names in same.values() if len(names) > 1 and max(map(len, names)) > 1), [])


def label_like(column: str) -> bool:
    """Whether the heading of a column has a word for labels: `fine_label`."""
    return not {"label", "labels", "class", "classes", "category", "categories"}.isdisjoint(_words(column))


# ---- numbered folders ----

_PART = re.compile(
    r"(.*?)(?<![^\W\d_])(?:images?|imgs?|photos?|pictures?|parts?|batch|chunk|shard|archive|vol|volume|fold|split|subset)"
    r"[ _-]?\d+",
    re.IGNORECASE,
)
_EDM = re.compile(r"\d{5}/img\d{8}\.\w+")
_CAMERA = re.compile(r"[1-9]\d\d[A-Z0-9_]{5}/.+")
_CHUNK = re.compile(r"(\d{4,})/\D*(\d+)\.\w+")
_HASH = re.compile(r"((?:[0-9a-f]{1,4}/)+)([0-9a-f]{12,})\.\w+", re.IGNORECASE)


def numbered_folders(names: Sequence[str]) -> str | None:
    """What the folders of these names, without a wrapper, are instead of classes; None if they are classes.

    Systems divide many files among folders by their number: 00001/img00001234.png, 01000/01234.png, 0234/1234.png (the last
    digits), images_002/01234.png; by their hash: 3f/3f2a....png; and cameras by hundreds: 100CANON.
    """
    folders = {name.split("/")[0] for name in names}
    listed = f"the numbered folders ({', '.join(sorted(folders)[:2])}{', ...' if len(folders) > 2 else ''})"
    if all(map(_EDM.fullmatch, names)):
        return listed
    if len(folders) == 1:
        return None
    if parts_among(folders) and len({name.split("/")[1] for name in names if name.count("/") > 1}) < 2:
        return listed
    if all(map(_CAMERA.fullmatch, names)):
        return "the folders of a camera"
    if all((match := _HASH.fullmatch(name)) and _begins(*match.groups()) for name in names):
        return "folders named by the beginning of their files' names"
    pairs = [match.groups() for match in map(_CHUNK.fullmatch, names) if match]
    if len(pairs) == len(names) and any(_divided([(int(a), int(b)) for a, b in pairs], k) for k in (1000, 10_000)):
        return listed
    return None


def parts_among(folders: Collection[str]) -> list[str]:
    """All, if they are parts of one set by their names: images_001 and images_002, fold1 and fold2, X_part_1 and X_part_2."""
    beginnings = {match and match[1].casefold() for match in map(_PART.fullmatch, folders)}
    return sorted(folders) if len(beginnings) == 1 and None not in beginnings else []


def _begins(folders: str, stem: str) -> bool:
    return stem.casefold().startswith(folders.replace("/", "").casefold())


def _divided(pairs: Sequence[tuple[int, int]], k: int) -> bool:
    """Whether each (folder, file) is a file of number n in folder n div k, or k (n div k), or n mod k, not always n itself."""
    rules: tuple[Callable[[int], int], ...] = (lambda n: n // k, lambda n: n // k * k, lambda n: n % k)
    return any(number >= k for _, number in pairs) and any(
        all(folder == rule(number) for folder, number in pairs) for rule in rules
    )
