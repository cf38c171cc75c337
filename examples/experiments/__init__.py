"""What adaptive orthogonalisation budgets buy: experiments on the demo's training, one command each; results in docs/evidence.md."""
