"""The benchmarks of the suites as small local files, with the columns, types, configurations and splits of the hub."""

from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_dataset

TEXT, TEXTS, NUMBERS = Value("string"), List(Value("string")), List(Value("int32"))
LANGUAGES = ("arabic", "bengali", "english", "finnish", "indonesian", "korean", "russian", "swahili", "telugu")
CHOICES = {"choices": TEXTS, "labels": NUMBERS}
ROWS = 12

# Columns of each data set.
COLUMNS = {
    "cais/mmlu": {
        "question": TEXT,
        "subject": TEXT,
        "choices": TEXTS,
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    },
    "openai/gsm8k": {"question": TEXT, "answer": TEXT},
    "SaylorTwift/bbh": {"input": TEXT, "target": TEXT},
    "google-research-datasets/tydiqa": {
        "id": TEXT,
        "title": TEXT,
        "context": TEXT,
        "question": TEXT,
        "answers": {"text": TEXTS, "answer_start": NUMBERS},
    },
    "truthfulqa/truthful_qa": {"question": TEXT, "mc1_targets": CHOICES, "mc2_targets": CHOICES},
    "openai/openai_humaneval": dict.fromkeys(["task_id", "prompt", "canonical_solution", "test", "entry_point"], TEXT),
    "google-research-datasets/nq_open": {"question": TEXT, "answer": TEXTS},
    "mandarjoshi/trivia_qa": {
        "question": TEXT,
        "question_id": TEXT,
        "question_source": TEXT,
        "entity_pages": dict.fromkeys(["doc_source", "filename", "title", "wiki_context"], TEXTS),
        "search_results": {
            **dict.fromkeys(["description", "filename", "title", "url", "search_context"], TEXTS),
            "rank": NUMBERS,
        },
        "answer": {
            **dict.fromkeys(["aliases", "normalized_aliases"], TEXTS),
            **dict.fromkeys(["matched_wiki_entity_name", "normalized_matched_wiki_entity_name"], TEXT),
            **dict.fromkeys(["normalized_value", "type", "value"], TEXT),
        },
    },
    "hotpotqa/hotpot_qa": {
        **dict.fromkeys(["id", "question", "answer", "type", "level"], TEXT),
        "supporting_facts": {"title": TEXTS, "sent_id": NUMBERS},
        "context": {"title": TEXTS, "sentences": List(TEXTS)},
    },
}
SPLITS = {
    "cais/mmlu": ["test", "validation", "dev"],
    "openai/gsm8k": ["train", "test"],
    "SaylorTwift/bbh": ["test"],
    "google-research-datasets/tydiqa": ["train", "validation"],
    "truthfulqa/truthful_qa": ["validation"],
    "openai/openai_humaneval": ["test"],
    "google-research-datasets/nq_open": ["train", "validation"],
    "mandarjoshi/trivia_qa": ["train", "validation", "test"],
    "hotpotqa/hotpot_qa": ["train", "validation"],
}
# MMLU and BBH have a configuration for each subject; the others are asked for by name, or have one only.
CONFIGURATION = {
    "openai/gsm8k": "main",
    "google-research-datasets/tydiqa": "secondary_task",
    "truthfulqa/truthful_qa": "multiple_choice",
    "openai/openai_humaneval": None,
    "google-research-datasets/nq_open": None,
    "mandarjoshi/trivia_qa": "rc.nocontext",
    "hotpotqa/hotpot_qa": "distractor",
}


def row(path: str, number: int) -> dict:
    """A row of a data set; questions differ, answers don't."""
    language = LANGUAGES[number % len(LANGUAGES)]
    return {
        "cais/mmlu": {"question": f"{number}: Two?", "subject": "any", "choices": list("1234"), "answer": 1},
        "openai/gsm8k": {"question": f"{number}: One and one?", "answer": "One and one are <<1+1=2>>2.\n#### 2"},
        "SaylorTwift/bbh": {"input": "not True is", "target": "False"},
        "google-research-datasets/tydiqa": {
            "id": f"{language}-{number}-0",
            "title": "Rome",
            "context": "Rome is old.",
            "question": "What is old?",
            "answers": {"text": ["Rome", "The city"], "answer_start": [0, 0]},
        },
        "truthfulqa/truthful_qa": {
            "question": f"{number}: Is the moon cheese?",
            "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
            "mc2_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
        },
        "openai/openai_humaneval": {
            "task_id": f"HumanEval/{number}",
            "prompt": "def add(a, b):\n",
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            "entry_point": "add",
        },
        "google-research-datasets/nq_open": {
            "question": f"{number}: what is old",
            "answer": ["Rome", "the city of Rome"],
        },
        "mandarjoshi/trivia_qa": {
            "question": f"{number}: What is old?",
            "question_id": f"tc_{number}",
            "question_source": "http://www.triviacountry.com/",
            "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
            "search_results": {
                "description": [],
                "filename": [],
                "title": [],
                "url": [],
                "search_context": [],
                "rank": [],
            },
            "answer": {
                "aliases": ["Rome", "Roma"],
                "normalized_aliases": ["rome", "roma"],
                "matched_wiki_entity_name": "",
                "normalized_matched_wiki_entity_name": "",
                "normalized_value": "rome",
                "type": "WikipediaEntity",
                "value": "Rome",
            },
        },
        "hotpotqa/hotpot_qa": {
            "id": f"5a{number}",
            "question": f"{number}: Which old city has a colosseum?",
            "answer": "Rome",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": {"title": ["Rome"], "sent_id": [0]},
            "context": {"title": ["Rome"], "sentences": [["Rome is old."]]},
        },
    }[path]


def write(folder: Path) -> None:
    """Write every data set, one Parquet file a split."""
    for path, splits in SPLITS.items():
        (folder / path).mkdir(parents=True)
        number = 2 * len(LANGUAGES) if "tydiqa" in path else ROWS
        rows = Dataset.from_list([row(path, i) for i in range(number)], features=Features(COLUMNS[path]))
        for split in splits:
            rows.to_parquet(folder / path / f"{split}.parquet")


class Hub:
    """What `datasets.load_dataset` reads, from the files that [`write`] wrote."""

    def __init__(self, folder: Path) -> None:
        write(folder)
        self.loaded: dict[str, DatasetDict] = {}
        for path, splits in SPLITS.items():
            files = {split: str(folder / path / f"{split}.parquet") for split in splits}
            self.loaded[path] = load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
            assert self.loaded[path][splits[0]].features == Features(COLUMNS[path])

    def load_dataset(self, path: str, name: str | None = None, **_) -> DatasetDict:
        assert name == CONFIGURATION[path] if path in CONFIGURATION else name, (path, name)
        return self.loaded[path]
