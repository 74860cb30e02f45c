"""How rows are read: every format, detection, and what is said about rows that cannot be read."""

from __future__ import annotations

import json
import pickle

import pytest
from datasets import Dataset

from aligntune.config.rl import DatasetConfig as RLDatasetConfig
from aligntune.config.sft import DatasetConfig
from aligntune.data.detect import row_reader
from aligntune.data.examples import (
    ChatExample,
    CompletionExample,
    LabelledExample,
    PairExample,
    PromptExample,
    TaggedExample,
    TextExample,
)
from aligntune.data.formats import FORMATS
from aligntune.errors import ConfigError, DataError

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
SHARE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def read(row, **settings):
    return reader(row, **settings)(row, 0)


def reader(row, **settings):
    rows = Dataset.from_list([row], on_mixed_types="use_json")
    return row_reader(rows, DatasetConfig(name="x", **settings))


def read_rl(row, kind, **settings):
    return row_reader(Dataset.from_list([row]), RLDatasetConfig(name="x", **settings), kind)(row, 0)


class TestSupervised:
    def test_text(self):
        assert read({"text": "abc"}) == TextExample("abc")

    def test_alpaca_joins_instruction_and_input_by_a_blank_line(self):
        row = {"instruction": "Add.", "input": "1 2", "output": "3"}
        assert read(row) == ChatExample(
            [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}], prompt_length=1
        )
        assert read({**row, "input": ""}).messages[0]["content"] == "Add."

    def test_alpaca_system_and_history(self):
        row = {"instruction": "And?", "output": "Yes.", "system": "Be brief.", "history": [["Hi", "Hello."]]}
        assert read(row) == ChatExample(
            [SYSTEM, USER, BOT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Yes."}],
            prompt_length=4,
        )

    def test_dolly(self):
        row = {"instruction": "Who?", "context": "Ann is here.", "response": "Ann.", "category": "qa"}
        assert read(row) == ChatExample(
            [{"role": "user", "content": "Who?\n\nAnn is here."}, {"role": "assistant", "content": "Ann."}],
            prompt_length=1,
        )

    def test_sharegpt_with_system_and_function_calls(self):
        row = {
            "conversations": [
                *SHARE,
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": null}}'},
                {"from": "observation", "value": "1"},
            ],
            "system": "Be brief.",
            "tools": '[{"name": "f"}]',
        }
        example = read(row)
        assert example.messages[:3] == [SYSTEM, USER, BOT]
        assert example.messages[3]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
        assert example.messages[4] == {"role": "tool", "content": "1"}
        assert example.tools == [{"type": "function", "function": {"name": "f"}}]

    def test_messages_drop_what_arrow_added(self):
        rows = Dataset.from_list(
            [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]}]}]
        )  # fmt: skip
        example = row_reader(rows, DatasetConfig(name="x"))(rows[0], 0)
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        assert example.messages == [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]

    def test_keys_of_both_spellings(self):
        talk = [{"role": "user", "value": "Hi"}, {"from": "gpt", "content": "Hello."}]
        assert read({"messages": talk}).messages == [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
        ]  # fmt: skip

    def test_the_older_spelling_of_a_call(self):
        call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
        (message,) = read({"messages": [call]}).messages
        assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
        assert set(message) == {"role", "content", "tool_calls"}

    def test_messages_as_json_text_and_as_text_parts(self):
        assert read({"messages": json.dumps([USER, BOT])}).messages == [USER, BOT]
        parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo."}]
        assert read({"messages": [USER, {"role": "assistant", "content": parts}]}).messages == [USER, BOT]

    def test_prompt_completion_as_text_or_messages(self):
        assert read({"prompt": "1+1=", "completion": "2"}) == CompletionExample("1+1=", "2")
        assert read({"prompt": [USER], "completion": [BOT]}) == ChatExample([USER, BOT], prompt_length=1)
        assert read({"prompt": [USER], "completion": "Hello."}) == ChatExample([USER, BOT], prompt_length=1)

    @pytest.mark.parametrize("task", ["instruction_following", "chat_completion"])
    def test_tasks_that_render_make_turns_of_text(self, task):
        assert read({"prompt": "Hi", "completion": "Hello."}, task_type=task) == ChatExample(
            [USER, BOT], prompt_length=1
        )

    def test_classification_and_tags(self):
        assert read({"text": "good", "label": 1}, task_type="text_classification") == LabelledExample("good", 1)
        row = {"tokens": ["Ann", "runs"], "ner_tags": ["B-PER", "O"]}
        assert read(row, task_type="token_classification") == TaggedExample(["Ann", "runs"], ["B-PER", "O"])

    def test_system_prompt_goes_before_conversations_that_have_none(self):
        assert read({"messages": [USER, BOT]}, system_prompt="Be brief.").messages == [SYSTEM, USER, BOT]
        other = {"role": "system", "content": "Be long."}
        assert read({"messages": [other, USER, BOT]}, system_prompt="Be brief.").messages[0] == other
        example = read({"instruction": "Hi", "output": "Hello."}, system_prompt="Be brief.")
        assert example == ChatExample([SYSTEM, USER, BOT], prompt_length=2)
        with pytest.raises(ConfigError, match="system_prompt needs conversations"):
            read({"text": "abc"}, system_prompt="Be brief.")


class TestColumns:
    def test_settings_name_columns(self):
        assert read({"q": "Hi", "a": "Hello."}, instruction_column="q", output_column="a").messages == [USER, BOT]
        assert read({"chat": [USER, BOT]}, messages_column="chat").messages == [USER, BOT]

    def test_a_named_column_that_is_not_there(self):
        with pytest.raises(DataError, match=r"text_column is 'body', but .* columns are: text"):
            read({"text": "abc"}, text_column="body")

    def test_a_named_column_that_the_format_does_not_use(self):
        with pytest.raises(ConfigError, match="tags_column has no effect: the rows are read as text"):
            read({"text": "abc", "t": 1}, tags_column="t")

    def test_a_named_column_decides_between_formats(self):
        row = {"text": "abc", "instruction": "Hi", "output": "Hello."}
        assert isinstance(read(row), ChatExample)
        assert read(row, text_column="text") == TextExample("abc")

    def test_other_usual_names_only_when_asked(self):
        row = {"question": "Hi", "answer": "Hello."}
        with pytest.raises(DataError, match=r"no known format.*columns: question, answer.*auto_detect_fields: true"):
            read(row)
        assert read(row, auto_detect_fields=True).messages == [USER, BOT]

    def test_pairs_are_not_told_to_set_columns_by_settings_that_they_lack(self):
        with pytest.raises(DataError, match="Set format_type, rename columns with column_mapping") as caught:
            read_rl({"a": "x"}, "preference")
        assert "_column settings" not in str(caught.value)

    def test_which_dataset_is_meant(self):
        """Of several, and of the training and the evaluation rows."""
        rows = Dataset.from_list([{"a": "x"}])
        with pytest.raises(DataError, match=r"^held_out.jsonl: no known format fits"):
            row_reader(rows, DatasetConfig(name="held_out.jsonl"))
        with pytest.raises(DataError, match=r"^rows \(split test\): format alpaca needs"):
            row_reader(rows, DatasetConfig(name="rows", split="test", format_type="alpaca"))
        read = row_reader(Dataset.from_list([{"messages": [USER]}]), DatasetConfig(name="held_out.jsonl"))
        with pytest.raises(DataError, match=r"^held_out.jsonl: row 7 \(messages\): "):
            read({"messages": "none"}, 7)

    def test_own_names_are_preferred_to_guesses(self):
        row = {"question": "no", "instruction": "Hi", "answer": "no", "output": "Hello."}
        assert read(row, auto_detect_fields=True).messages == [USER, BOT]


class TestDetection:
    def test_structured_formats_come_before_plain_text(self):
        assert reader({"instruction": "a", "input": "", "output": "b", "text": "c"}).row_format.name == "alpaca"

    def test_ambiguous_columns_show_the_formats(self):
        row = {"instruction": "a", "output": "b", "messages": [USER]}
        with pytest.raises(DataError, match=r"fit several formats, alpaca and messages .*set format_type"):
            read(row)
        assert read(row, format_type="Messages").messages == [USER]

    def test_an_unknown_format_lists_the_known_ones(self):
        with pytest.raises(ConfigError, match=r"'alpacca' is not a format.*alpaca \(instruction, output\)"):
            read({"text": "a"}, format_type="alpacca")

    def test_a_named_format_lists_its_missing_columns(self):
        with pytest.raises(
            DataError, match=r"format alpaca needs output \(column 'output'\); the columns are: instruction"
        ):
            read({"instruction": "a"}, format_type="alpaca")

    def test_a_format_of_another_task(self):
        with pytest.raises(ConfigError, match=r"'alpaca' does not fit the task, which reads: text"):
            read({"instruction": "a", "output": "b"}, format_type="alpaca", task_type="text_generation")
        with pytest.raises(DataError, match="The rows look like alpaca, which this task_type does not read"):
            read({"instruction": "a", "output": "b"}, task_type="text_generation")


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"messages": "hello"}, "expected a list of messages, got str"),
            ({"messages": [{"role": "alien", "content": "x"}]}, "unknown role 'alien'"),
            ({"messages": [{"content": "x"}]}, "needs 'role' and 'content'"),
            (
                {"messages": [{"role": "user", "content": {"image": 1}}]},
                "content of a message should be text, got dict",
            ),
            ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "a function_call should be JSON"),
            ({"text": 3}, "text should be text, got int: 3"),
            ({"instruction": "a", "output": ["b"]}, "the answer should be text, got list"),
            ({"instruction": "a", "output": "b", "history": [["one"]]}, r"list of \[question, answer\] pairs"),
            ({"instruction": "a", "output": "b", "history": [["one", None]]}, r"list of \[question, answer\] pairs"),
            ({"messages": [{"role": "user", "text": "x"}]}, r"no content \(null\); its keys are: role, text"),
            (
                {"messages": [{"role": "user", "content": None, "weight": 1}]},
                r"a message of user has no content \(null\)",
            ),
            (
                {"messages": [{"role": "user", "content": "x"}], "tools": "3"},
                "tools should be a list of schemas, got int",
            ),
            ({"messages": [{"role": "assistant", "content": "x", "tool_calls": "3"}]}, "tool calls should be a list"),
            ({"conversations": [{"from": "function_call", "value": None}]}, "tool calls should be a list"),
            ({"prompt": [], "completion": [BOT]}, "prompt has no messages"),
            ({"prompt": None, "completion": "x"}, r"prompt is empty \(null\)"),
            ({"prompt": "x", "completion": 3}, "expected text or a list of messages, got int: 3"),
            ({"instruction": "a", "output": None}, r"the answer is empty \(null\)"),
            ({"messages": [{"role": "assistant", "content": None}]}, r"a message of assistant has no content \(null\)"),
            ({"messages": [{"role": "user"}]}, r"a message of user has no content \(null\)"),
        ],
    )
    def test_the_row_is_shown(self, row, message):
        made = row_reader(Dataset.from_list([row]), DatasetConfig(name="x", format_type=self.name(row)))
        with pytest.raises(DataError, match=rf"(?s)row 7 .*{message}.*\n  {next(iter(row))}: "):
            made(row, 7)

    def name(self, row):
        return {"messages": "messages", "conversations": "sharegpt", "text": "text", "instruction": "alpaca"}.get(
            next(iter(row)), "prompt_completion"
        )

    def test_tokens_and_tags_of_different_length(self):
        with pytest.raises(DataError, match=r"(?s)row 0.*2 tokens but 1 tags.*tokens: "):
            read({"tokens": ["a", "b"], "ner_tags": [0]}, task_type="token_classification")


class TestPreference:
    PAIR = PairExample([USER], [BOT], [{"role": "assistant", "content": "Go away."}])

    def test_text_becomes_turns_unless_the_task_is_text(self):
        row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}
        assert read_rl(row, "preference") == self.PAIR
        assert read_rl(row, "preference", task_type="text") == PairExample("Hi", "Hello.", "Go away.")

    def test_messages_with_the_prompt_repeated_in_the_answers(self):
        row = {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, self.PAIR.rejected[0]]}
        assert read_rl(row, "preference") == self.PAIR

    def test_a_repeated_prompt_is_taken_off_before_a_system_message_is_put_on(self):
        no = self.PAIR.rejected[0]
        made = PairExample([SYSTEM, USER], self.PAIR.chosen, self.PAIR.rejected)
        row = {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, no], "system": "Be brief."}
        assert read_rl(row, "preference") == made
        row = {"prompt": "Hi", "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, no]}
        assert read_rl(row, "preference") == made

    def test_answers_that_begin_with_another_prompt(self):
        row = {"prompt": "Hi ", "chosen": [USER, BOT], "rejected": [USER, self.PAIR.rejected[0]]}
        with pytest.raises(DataError, match=r"chosen begins with a message of user.*repeat the prompt word for word"):
            read_rl(row, "preference")

    def test_implicit_prompt(self):
        row = {"chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, self.PAIR.rejected[0]]}
        assert read_rl(row, "preference") == PairExample([SYSTEM, USER], self.PAIR.chosen, self.PAIR.rejected)

    def test_sharegpt_pairs(self):
        row = {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "Go away."},
        }
        assert read_rl(row, "preference") == self.PAIR

    def test_alpaca_pairs(self):
        row = {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "Go away."}
        assert read_rl(row, "preference") == self.PAIR
        assert read_rl({**row, "input": "1 2"}, "preference").prompt[0]["content"] == "Hi\n\n1 2"

    def test_transcripts(self):
        start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Say:\n\nHuman\n\nAssistant:"
        row = {"chosen": f"{start} Yes.", "rejected": f"{start} No.\n\nNever."}
        assert read_rl(row, "preference") == PairExample(
            [USER, BOT, {"role": "user", "content": "Say:\n\nHuman"}],
            [{"role": "assistant", "content": "Yes."}],
            [{"role": "assistant", "content": "No.\n\nNever."}],
        )

    @pytest.mark.parametrize("order", [{"scores": [1.0, 3.0, 0.5]}, {"ranks": [2, 1, 3]}])
    def test_ranked_lists_give_best_against_worst(self, order):
        row = {"prompt": "Hi", "responses": ["Hm.", "Hello.", "Go away."], **order}
        assert read_rl(row, "preference") == self.PAIR

    def test_ranked_lists_that_do_not_add_up(self):
        with pytest.raises(DataError, match="3 responses but 2 scores"):
            read_rl({"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [1, 2]}, "preference")
        for order in ({"scores": [1.0, None]}, {"ranks": [1, None]}, {"scores": [1.0, float("nan")]}, {"ranks": 3}):
            with pytest.raises(DataError, match="should be lists of numbers"):
                read_rl({"prompt": "Hi", "responses": ["a", "b"], **order}, "preference")
        with pytest.raises(DataError, match="needs 'scores'"):
            read_rl({"prompt": "Hi", "responses": ["a", "b"]}, "preference")

    def test_two_texts_without_a_prompt(self):
        with pytest.raises(DataError, match="there is no prompt column"):
            read_rl({"chosen": "a", "rejected": "b"}, "preference")
        with pytest.raises(DataError, match="do not begin with the same message"):
            read_rl({"chosen": [USER, BOT], "rejected": [BOT, BOT]}, "preference")

    def test_system_prompt(self):
        row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}
        assert read_rl(row, "preference", system_prompt="Be brief.").prompt == [SYSTEM, USER]


class TestPrompts:
    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "Hi", "answer": "1"},
            {"prompt": [USER]},
            {"question": "Hi", "answer": "1"},
            {"messages": [USER, BOT]},
            {"conversations": SHARE},
            {"instruction": "Hi", "input": "", "output": "Hello."},
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
            {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "No."}]},
            {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        ],
        ids=lambda row: "-".join(row),
    )
    def test_prompts_of_every_format(self, row):
        assert read_rl(row, "prompt") == PromptExample([USER])

    def test_raw_prompts(self):
        assert read_rl({"prompt": "1+1="}, "prompt", task_type="text") == PromptExample("1+1=")
        with pytest.raises(ConfigError, match="tools needs conversations"):
            read_rl({"prompt": "1+1="}, "prompt", task_type="text", tools=[{"name": "f"}])

    def test_tools_of_the_config_serve_rows_without_their_own(self):
        schema = {"type": "function", "function": {"name": "f"}}
        assert read_rl({"prompt": "Hi"}, "prompt", tools=[{"name": "f"}]).tools == [schema]
        row = {"prompt": "Hi", "tools": '[{"name": "g"}]'}
        assert read_rl(row, "prompt", tools=[{"name": "f"}]).tools[0]["function"]["name"] == "g"


def test_a_format_reaches_a_worker_that_was_not_forked() -> None:
    """Streams send their format to workers, pickled where processes are spawned (macOS, Windows, Python 3.14)."""
    assert all(pickle.loads(pickle.dumps(entry)) is entry for entry in FORMATS.values())
