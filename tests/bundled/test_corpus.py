"""Passages from source files: extraction, cleaning, splitting and the manifest."""

import pytest

from loopq_compile.bundled import corpus
from loopq_compile.bundled.corpus import Passage

LONG = "Return the number of items that fit into the box, counted twice when the box is open on both sides of it."
SOURCE = f'''"""{LONG} (module)"""
raise RuntimeError("sources are parsed, never run")

class Box:
    """{LONG} (class)"""

    def count(self):
        """
        {LONG} (method)

            indented example   


        end
        """

    def short(self):
        """Too short."""

add_docstr(object, r"""{LONG} (call)""".format(1))
print("""{LONG} (no documentation)""")
'''


def test_docstrings_and_documentation_calls_are_found_and_cleaned():
    texts = [passage.text for passage in corpus.parse_passages("box.py", SOURCE)]
    assert sorted(text.split("(")[-1].split(")")[0] for text in texts) == ["call", "class", "method", "module"]
    method = next(text for text in texts if "(method)" in text)
    assert method == f"{LONG} (method)\n\n    indented example\n\nend"


@pytest.mark.parametrize("code", ["def broken(:", "\0", ""], ids=["syntax", "null", "empty"])
def test_a_source_that_does_not_parse_has_no_passages(code):
    assert corpus.parse_passages("bad.py", code) == []


def test_white_space_does_not_count_for_the_hash():
    first, second = Passage("a.py", "one  two\n three"), Passage("b.py", "one two three")
    assert first.digest == second.digest
    assert corpus.deduplicate([first, second]) == [first]


def test_the_split_is_stable_small_and_disjoint():
    # Written out: a change of the hash or the rule would silently put training text into the held-out set.
    assert Passage("any.py", "one two three").digest == "6899ee404683a14e"
    passages = [Passage("any.py", f"passage number {index}") for index in range(5000)]
    held_out = {passage.digest for passage in passages if passage.held_out}
    assert 60 < len(held_out) < 140
    assert held_out.isdisjoint(passage.digest for passage in passages if not passage.held_out)
    assert all(Passage("other.py", passage.text).held_out == passage.held_out for passage in passages[:500])


def test_long_texts_are_cut_at_empty_lines():
    paragraphs = [f"{index} " + "word " * 40 for index in range(30)]
    parts = list(corpus.split_long("\n\n".join(paragraphs), limit=1000))
    assert len(parts) > 1 and all(len(part) <= 1000 for part in parts)
    assert "\n\n".join(parts) == "\n\n".join(paragraphs)
    assert [len(part) for part in corpus.split_long("x" * 5000, limit=1000)] == [1000]


def test_caps_and_shuffles_depend_on_hashes_alone():
    passages = [Passage("any.py", f"passage number {index} " * 5) for index in range(50)]
    capped = corpus.cap_characters(passages, 1000)
    assert sum(len(passage.text) for passage in capped) <= 1000
    assert corpus.cap_characters(passages[::-1], 1000) == capped
    assert corpus.shuffled(passages, 3) == corpus.shuffled(passages[::-1], 3) != corpus.shuffled(passages, 4)


def test_near_duplicates_of_training_text_leave_the_held_out_set():
    lines = [f"this line number {index} is long enough to count" for index in range(4)]
    training = [Passage("a.py", "\n".join(lines))]
    copy = Passage("b.py", "\n".join([*lines[:3], "and one line of its own, long enough"]))
    fresh = Passage(
        "c.py", "\n".join([lines[0], "a first line of its own, long enough", "a second line of its own, long enough"])
    )
    assert corpus.drop_near_duplicates([copy, fresh], training) == [fresh]


def test_a_manifest_finds_its_passages_again_and_reports_no_others():
    passages = corpus.read_source("textwrap.py")
    assert passages and all(passage.package == corpus.STDLIB for passage in passages)
    manifest = corpus.make_manifest(passages)
    manifest["textwrap.py"].append(["0" * 16, 100])
    manifest["no_such_package/file.py"] = [["1" * 16, 100]]
    assert sorted(p.digest for p in corpus.read_manifest(manifest)) == sorted(
        p.digest for p in corpus.deduplicate(passages)
    )


def test_topics_are_read_from_the_standard_library():
    assert any("context manager" in passage.text for passage in corpus.read_source(corpus.TOPICS))


def test_a_package_that_is_not_installed_has_no_sources():
    assert corpus.package_sources("no_such_package_here") == []
    assert corpus.read_source("no_such_package_here/module.py") == []


def test_sources_leave_tests_out():
    sources = corpus.package_sources("networkx")
    assert "networkx/classes/graph.py" in sources
    assert not any("/tests/" in source for source in sources)
