{
  description = "Softmax attention with every modifier and every gradient";
  inputs.kernel-builder.url = "github:huggingface/kernel-builder";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
