{
  description = "Stick-breaking attention with a gradient";
  inputs.kernel-builder.url = "github:huggingface/kernel-builder";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
