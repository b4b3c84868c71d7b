"""Every text of every node, in all four languages, as the live schema has it.

After a change of the English texts: ``LANCE_WRITE_LOCALES=1 pytest tests/test_locales.py`` writes ``locales/en``; the other
languages are written by people, and the tests name what they lack.
"""

from __future__ import annotations

import os
import re

import pytest
from comfy_browser import open_ui
from node_texts import FILES, LANGUAGES, english, read, strings, write

TRANSLATED = LANGUAGES[1:]
HAN, KANA, HANGUL = "\u4e00-\u9fff", "\u3040-\u30ff", "\uac00-\ud7a3"
OWN = {"zh": f"[{HAN}]", "ja": f"[{HAN}{KANA}]", "ko": f"[{HANGUL}]"}
FOREIGN = {"en": "[^\x20-\x7e]", "zh": f"[{KANA}{HANGUL}]", "ja": f"[{HANGUL}]", "ko": f"[{HAN}{KANA}]"}
# UTF-8 that was read as Latin-1 or Windows-1252 leaves letters that none of these languages needs.
MOJIBAKE = re.compile("[\u0080-\u00ff\ufffd\ue000-\uf8ff]")
SYNTAX = re.compile(r"[{}|]|@[:.]")  # vue-i18n would compile these
# Names that ComfyUI's own translations leave as they are, too.
CHOICES = {"auto", "default", "custom", "own", "edit source", "subject", "global", "channel", "none", "cached", "dense"}
PROPER = {"CLIP", "VAE", "CFG", "cfg", "fps", "top_p", "Latent", "ViT token"}


@pytest.fixture(scope="module")
def schemas(comfy_server):
    return {name: schema for name, schema in comfy_server.object_info().items() if name.startswith("LanceNative")}


@pytest.mark.comfy
def test_english_is_the_live_schema(schemas):
    found = english(schemas)
    if os.environ.get("LANCE_WRITE_LOCALES") == "1":
        write("en", "nodeDefs", found)
    assert read("en") == found
    assert len(found) >= 17


def test_every_text_is_there():
    assert [path for path, text in strings(read("en")).items() if not (isinstance(text, str) and text.strip())] == []


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", TRANSLATED)
def test_languages_hold_the_same_texts(language, file):
    wanted, found = strings(read("en", file)), strings(read(language, file))
    assert sorted(wanted.keys() - found.keys()) == [], "not translated"
    assert sorted(found.keys() - wanted.keys()) == [], "left over"


@pytest.mark.parametrize("language", TRANSLATED)
def test_nothing_is_left_in_english(language):
    left = {path: text for path, text in strings(read(language)).items() if not re.search(OWN[language], text)}
    assert {path: text for path, text in left.items() if text not in PROPER} == {}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_in_their_own_script(language, file):
    wrong = re.compile(f"{FOREIGN[language]}|{MOJIBAKE.pattern}|{SYNTAX.pattern}|^\\s|\\s$")
    assert {path: text for path, text in strings(read(language, file)).items() if wrong.search(text)} == {}


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_mojibake_is_seen(encoding):
    for text in ("\u6761\u4ef6", "\u304b\u306a", "\ud55c", "\u2019"):
        assert not MOJIBAKE.search(text)
        assert MOJIBAKE.search(text.encode().decode(encoding, "replace"))


@pytest.mark.parametrize("language", TRANSLATED)
def test_numbers_and_choices_survive_translation(language):
    """A limit or the name of a choice that is lost is a wrong translation, whatever the words."""
    source, found = strings(read("en")), strings(read(language))
    kept = re.compile(r"\d+(?:\.\d+)?|\b\w+_\d+\w+\b|models/\w+")
    for path, text in source.items():
        names = set(re.findall(r"'([\w ]+)'", text)) & CHOICES
        assert [part for part in {*kept.findall(text), *names} if part not in found[path]] == [], path


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_within_a_node_differ(language):
    for node, values in read(language).items():
        for kind in ("inputs", "outputs"):
            names = [value["name"] for value in values[kind].values() if "name" in value]
            assert len(set(names)) == len(names), f"{node}: {names}"
    titles = [values["display_name"] for values in read(language).values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.comfy
def test_comfyui_serves_all_languages(comfy_server):
    served = comfy_server.get("/i18n")
    for language in LANGUAGES:
        assert {node: served[language]["nodeDefs"][node] for node in read(language)} == read(language)
        assert served[language]["templateWorkflows"]["category"]["lance-native"] == "Lance Native"


LABELS = """(types) => Object.fromEntries(types.map((type) => {
    const node = LiteGraph.createNode(type), shown = (slot) => slot.label ?? slot.localized_name;
    const inputs = node.inputs.filter((input) => !input.name.includes(".")).map((input) => [input.name, shown(input)]);
    return [type, {title: node.title, inputs: Object.fromEntries(inputs), outputs: node.outputs.map(shown)}];
}))"""


@pytest.mark.comfy
@pytest.mark.parametrize("language", TRANSLATED)
def test_the_web_page_shows_the_translations(comfy_server, language):
    """Titles, inputs and named outputs; inputs that grow (image_0, image_1, ...) have names of the page's own making."""
    texts = read(language)
    comfy_server.post("/settings/Comfy.Locale", language)
    try:
        with open_ui(comfy_server) as page:
            shown = page.evaluate(LABELS, list(texts))
    finally:
        comfy_server.post("/settings/Comfy.Locale", "en")
    for node, values in texts.items():
        growing = {"images", "visuals"} & values["inputs"].keys()
        wanted = {name: value["name"] for name, value in values["inputs"].items() if name not in growing}
        assert shown[node]["title"] == values["display_name"]
        assert shown[node]["inputs"] == wanted, node
        for value, label in zip(values["outputs"].values(), shown[node]["outputs"]):
            assert value.get("name", label) == label, node
