"""All cases of the contract suite, in the order of the coverage table."""

from contract import (
    cases_bases,
    cases_compressed,
    cases_elementwise,
    cases_examples,
    cases_muon,
    cases_pytorch_optimizer_muon,
    cases_references,
    cases_standins,
    cases_torch,
)

CASES = [
    *cases_torch.CASES,
    *cases_elementwise.CASES,
    *cases_bases.CASES,
    *cases_muon.CASES,
    *cases_pytorch_optimizer_muon.CASES,
    *cases_compressed.CASES,
    *cases_references.CASES,
    *cases_examples.CASES,
    *cases_standins.CASES,
]
