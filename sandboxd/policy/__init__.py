"""Configuration and decisions: YAML to frozen classes, and whether a tool call may happen."""

from sandboxd.policy.arguments import check_arguments, parse_arguments
from sandboxd.policy.decide import Decision, SessionTerms, decide, session_terms
from sandboxd.policy.loader import lint_tools, load_config, load_settings
from sandboxd.policy.model import (
    DEFAULT_TEAM,
    Agent,
    Annotations,
    Concurrency,
    Config,
    Key,
    Limits,
    Mount,
    Policy,
    Rule,
    SecretSpec,
    Settings,
    Stdin,
    Team,
    Tool,
    UidRange,
    Workspace,
)
from sandboxd.policy.problems import ConfigErrors
from sandboxd.policy.toolcheck import check_program

__all__ = [
    "DEFAULT_TEAM",
    "Agent",
    "Annotations",
    "Concurrency",
    "Config",
    "ConfigErrors",
    "Decision",
    "Key",
    "Limits",
    "Mount",
    "Policy",
    "Rule",
    "SecretSpec",
    "SessionTerms",
    "Settings",
    "Stdin",
    "Team",
    "Tool",
    "UidRange",
    "Workspace",
    "check_arguments",
    "check_program",
    "decide",
    "lint_tools",
    "load_config",
    "load_settings",
    "parse_arguments",
    "session_terms",
]
