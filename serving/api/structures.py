"""`response_format` and `structured_outputs`: what a request wants its answers to match. Compiles nothing."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from serving.api.fields import RequestModel
from serving.api.values import StructureText, at_most, fault
from serving.types import Structure

Schema = dict[str, Any]


def _parse_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("is not the text of a JSON schema") from error


SchemaOrText = Annotated[Schema, BeforeValidator(_parse_text, json_schema_input_type=Schema | str)]


Choice = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), at_most("structure_choices")]


class Exact(RequestModel):
    """Takes no other fields than its own: whatever else a client expects of it would not happen."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")


class JsonSchemaFormat(Exact):
    """A named JSON schema. Answers always match it, whatever `strict` says."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", examples=["answer"])
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema", examples=[{"type": "object", "properties": {}}])
    strict: bool | None = None


class ResponseFormat(Exact):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault("json_schema", "json_schema is required with type json_schema, and only there")
        return self

    def structure(self) -> tuple[Structure, str] | None:
        """What answers must match, and the field that says so."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema_ is None:
            return Structure("json_object"), "response_format"
        text = json.dumps(self.json_schema.schema_, ensure_ascii=False)
        return Structure("json_schema", text), "response_format.json_schema.schema"


class StructuredOutputs(Exact):
    """vLLM's way: exactly one of these. `grammar` is in llguidance's dialect of Lark."""

    json_: SchemaOrText | None = Field(None, alias="json", description="A JSON schema, or its text.")
    json_object: Literal[True] | None = None
    regex: StructureText | None = Field(None, description="In the syntax of Rust's regex.", examples=["[a-z]+"])
    choice: Choice | None = Field(None, description="The answer is one of these.", examples=[["yes", "no"]])
    grammar: StructureText | None = Field(None, examples=['start: "yes" | "no"'])

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        given = (self.json_, self.json_object, self.regex, self.choice, self.grammar)
        if sum(value is not None for value in given) != 1:
            raise ValueError("exactly one of json, json_object, regex, choice and grammar must be given")
        return self

    def structure(self) -> tuple[Structure, str]:
        """What answers must match, and the field that says so."""
        field = "structured_outputs."
        if self.regex is not None:
            return Structure("regex", self.regex), field + "regex"
        if self.grammar is not None:
            return Structure("grammar", self.grammar), field + "grammar"
        if self.choice is not None:
            return Structure("choice", json.dumps(self.choice, ensure_ascii=False)), field + "choice"
        if self.json_ is None:
            return Structure("json_object"), field + "json_object"
        return Structure("json_schema", json.dumps(self.json_, ensure_ascii=False)), field + "json"
