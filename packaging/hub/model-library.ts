// The entry of splitbundle in model-libraries.ts of huggingface.js, and its snippet for model-libraries-snippets.ts.
// OWNER is the account that holds the project's repository.

import type { ModelData } from "@huggingface/tasks";

export const splitbundle = (model: ModelData): string[] => [
  `# pip install "splitbundle[torch,share]"
import splitbundle

bundle = splitbundle.open("hf://${model.id}")
logits = bundle.pipeline()(token_ids)  # (batch, sequence) -> (batch, sequence, vocab)
part = bundle.stage(layers=(0, 2))  # or any range of its layers`,
  `# One shard alone
splitbundle pull hf://${model.id} --shard bottom -o bottom.splitbundle`,
];

export const entry = {
  prettyLabel: "splitbundle",
  repoName: "splitbundle",
  repoUrl: "https://github.com/OWNER/splitbundle",
  snippets: splitbundle,
  filter: false,
  countDownloads: `path:"manifest.json"`,
} as const;
