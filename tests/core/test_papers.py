"""The papers file and the map of the field: complete, consistent, and refused when they are not."""

import copy
import subprocess
import sys

import pytest

from moestro.core.card import STAGES, MethodCard
from moestro.core.datafiles import read_yaml
from moestro.core.errors import ConfigError
from moestro.core.papers import NUM_PAPERS, load_papers, parse_papers
from moestro.core.taxonomy import SOURCES, check_path, taxonomy_paths, taxonomy_tree


class Card:
    """A card that names several places."""

    def __init__(self, *taxonomy: str) -> None:
        self.taxonomy = taxonomy


@pytest.fixture
def rows() -> list[dict]:
    return copy.deepcopy(read_yaml("moestro.core", "papers.yaml"))


def test_there_are_fifty_papers_with_unique_keys() -> None:
    papers = load_papers()
    assert len(papers) == len({paper.key for paper in papers}) == NUM_PAPERS == 50
    assert len({paper.title for paper in papers}) == 50
    assert len({paper.arxiv for paper in papers}) == 50


def test_every_life_stage_has_a_paper() -> None:
    assert {stage for paper in load_papers() for stage in paper.stages} == set(STAGES)


def test_planned_methods_of_the_routing_papers() -> None:
    planned = {paper.key: paper.methods for paper in load_papers()}
    assert planned["rmoe"] == ("train.rmoe",)
    assert planned["moma"] == ("train.moma", "train.mixture_of_depths")
    assert planned["read-me"] == ("convert.read_me", "train.read_me", "train.index_pool", "serve.read_me_belady")
    assert planned["loramoe"] == ()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("key", "bam", "key bam appears twice"),
        ("key", "Ada MoE", "lower-case words"),
        ("title", "", "title=''"),
        ("year", 2023, "contradicts arXiv id 2406.13233"),
        ("year", "2024", "expected a whole number"),
        ("arxiv", 2406.1, "expected a quoted id"),
        (
            "taxonomy",
            "gating/sparse/null",
            "below 'gating/sparse': expert-choice, non-trainable, token-choice",
        ),
        ("taxonomy", "gating/dense/soft", "below 'gating/dense': nothing, it is a leaf"),
        ("taxonomy", "gate", "below 'the root': application, composition"),
        ("stages", [], "stages is empty"),
        ("stages", ["training"], "stage 'training' is unknown"),
        ("stages", "train", "expected a list"),
        ("methods", ["serve.adamoe"], "needs stage 'serve'"),
        ("methods", ["train.bigmac"], "method train.bigmac appears twice"),
        ("methods", ["adamoe"], "expected stage.name"),
        ("colour", "red", "unknown key colour"),
    ],
)
def test_a_broken_row_is_refused_with_its_name(rows: list[dict], field: str, value: object, message: str) -> None:
    rows[0][field] = value
    with pytest.raises(ConfigError) as caught:
        parse_papers(rows)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_refused(rows: list[dict]) -> None:
    with pytest.raises(ConfigError, match="49 papers, expected 50"):
        parse_papers(rows[1:])
    with pytest.raises(ConfigError, match="out of alphabetical order"):
        parse_papers(rows[::-1])
    with pytest.raises(ConfigError, match="expected a list of papers"):
        parse_papers({"papers": rows})
    with pytest.raises(ConfigError, match="row 0: expected a mapping"):
        parse_papers(["adamoe", *rows[1:]])
    del rows[3]["stages"]
    with pytest.raises(ConfigError, match="composition-of-experts: stages missing"):
        parse_papers(rows)


def test_the_map_holds_the_words_of_the_survey() -> None:
    paths = taxonomy_paths()
    assert {"gating/sparse/token-choice", "gating/soft/expert-merging", "system/storage"} <= paths
    assert {"scheme/dense-to-sparse", "parameter-efficient/ffn", "losses/z"} <= paths
    assert {node.source for node in taxonomy_tree().walk()} == set(SOURCES)
    assert all(node.title for node in taxonomy_tree().walk())


def test_leaves_without_a_method_are_not_implemented() -> None:
    tree = taxonomy_tree()
    assert len(tree.leaves()) > 80
    assert not tree.implemented
    assert not any(leaf.implemented for leaf in tree.leaves())


def test_methods_stand_where_their_cards_say() -> None:
    cards = {
        "train.switch": MethodCard(
            title="Switch", year=2021, summary="one expert", taxonomy="gating/sparse/token-choice/top-1"
        ),
        "train.topk": Card("gating/sparse/token-choice"),
        "train.evomoe": Card("scheme/dense-to-sparse", "gating/dense"),
    }
    nodes = {node.path: node for node in taxonomy_tree(cards).walk()}
    assert nodes["gating/sparse/token-choice/top-1"].methods == ("train.switch",)
    assert nodes["gating/sparse/token-choice"].methods == ("train.topk",)
    assert nodes["gating/dense"].methods == nodes["scheme/dense-to-sparse"].methods == ("train.evomoe",)
    done = {leaf.path for leaf in taxonomy_tree(cards).leaves() if leaf.implemented}
    assert done == {"gating/sparse/token-choice/top-1", "gating/dense", "scheme/dense-to-sparse"}
    assert nodes["gating"].implemented
    assert not nodes["gating/soft"].implemented
    assert nodes["gating/sparse/token-choice"].name == "token-choice"


def test_a_card_off_the_map_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.odd: taxonomy 'gating/odd' is unknown; below 'gating'"):
        taxonomy_tree({"train.odd": Card("gating/odd")})
    assert check_path("gating/dense", "here") == "gating/dense"


def test_a_missing_data_file_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"moestro.core/nothing.yaml: the file is missing"):
        read_yaml("moestro.core", "nothing.yaml")


def test_papers_load_without_torch_or_transformers() -> None:
    code = (
        "import sys; from moestro.core.papers import load_papers; load_papers();"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
