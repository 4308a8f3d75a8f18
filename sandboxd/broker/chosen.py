"""Which versions of which variables a tool gets, and their plaintexts when it starts."""

from __future__ import annotations

from collections.abc import Sequence

from sandboxd.broker.brief import brief
from sandboxd.policy.decide import Decision
from sandboxd.policy.model import SecretSpec
from sandboxd.secret import Secret
from sandboxd.vault.vault import Sealed, Snapshot, Vault

__all__ = ["Chosen", "Unsealed", "choose", "unseal"]

Chosen = Sequence[tuple[SecretSpec, Sealed]]
Unsealed = list[tuple[SecretSpec, Secret]]


def choose(
    vault: Vault, decision: Decision, snapshot: Snapshot
) -> tuple[list[tuple[SecretSpec, Sealed]], list[str], list[str]]:
    """What an allowed call gets; the required variables that are missing or revoked."""
    chosen: list[tuple[SecretSpec, Sealed]] = []
    missing: list[str] = []
    revoked: list[str] = []
    for spec in decision.inject if decision.verdict != "deny" else ():
        sealed = snapshot.variables.get(spec.variable)
        if sealed is not None and vault.is_revoked(sealed):
            revoked.append(str(spec.variable))
        elif sealed is not None:
            chosen.append((spec, sealed))
        elif spec.required:
            missing.append(str(spec.variable))
    return chosen, missing, revoked


async def unseal(vault: Vault, chosen: Chosen) -> Unsealed:
    """The plaintexts. The vault takes no lock for that and reads no disk."""
    return await brief(
        sum(len(sealed.ciphertext) for _, sealed in chosen),
        lambda: [(spec, vault.unseal(sealed)) for spec, sealed in chosen],
    )
