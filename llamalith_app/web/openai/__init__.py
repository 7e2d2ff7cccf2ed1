"""What OpenAI clients need that no route owns: what a call asks of a job, and how a job's answer looks to them."""
