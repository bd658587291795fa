"""Generation from product codes: a masked transformer fills in the codes, the autoencoder decodes them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import AmusedScheduler, DiffusionPipeline
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.models.masked_transformer import PQMaskedTransformer
from diffusers_pq.pipelines.class_labels import ClassLabelsMixin
from diffusers_pq.pipelines.pq_mixin import ImportedByCodeMixin, check_tokens


# Noise on the log-confidence beside which the confidence does not matter.
_RANDOM_ORDER = 1e6


class MaskedPQPipeline(ClassLabelsMixin, ImportedByCodeMixin, DiffusionPipeline):
    r"""
    Pictures of classes or of texts by masked generation (MaskGIT, Chang et al., 2022) of the codes of a [`PQModel`]:
    all codes begin masked, and each step fixes those that the [`PQMaskedTransformer`] is surest of. Given codes stay,
    which makes inpainting, outpainting and variations of the same call. The codes always stand for codebook entries.

    Args:
        vae ([`PQModel`]): Whose codes are generated.
        transformer ([`PQMaskedTransformer`]): With the S and K of `vae`.
        scheduler ([`AmusedScheduler`]): With K as its `mask_token_id`.
        text_encoder (`CLIPTextModel`, *optional*): Of a text-conditional transformer.
        tokenizer (`CLIPTokenizer`, *optional*): Of the `text_encoder`.
        id2label (`dict[int, str]`, *optional*): Names of the classes of a class-conditional transformer.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if S, K, the classes or the text states of the parts do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["codes"]

    def __init__(
        self,
        vae: PQModel,
        transformer: PQMaskedTransformer,
        scheduler: AmusedScheduler,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        _check_components(vae, transformer, scheduler, text_encoder, tokenizer)
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self._register_labels(id2label)
        self.vae_scale_factor = vae.downsampling_factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @property
    def denoiser(self) -> PQMaskedTransformer:
        """The transformer, under the name that [`LatentDiffusionPQPipeline`] has for its model."""
        return self.transformer

    @property
    def num_classes(self) -> int:
        return self.transformer.config.num_classes or 0

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        codes: torch.LongTensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 32,
        guidance_scale: float = 3.0,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        order: str = "confidence",
        order_temperature: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate pictures.

        Args:
            prompt (`str` or `list[str]`, *optional*): Of a text-conditional model.
            class_labels (`int`, `str` or a list of them, *optional*): Of a class-conditional model.
            image (*optional*): Pictures whose codes are kept where `mask_image` is black, in any of diffusers' forms.
            mask_image (*optional*): White parts are generated anew; needs `image`.
            codes (`torch.LongTensor` of shape `(B, S, h, w)`, *optional*):
                Codes that are kept; -1 marks those to be generated. Excludes `image`.
            height, width (`int`, *optional*):
                Pixels, multiples of F. Default: the size of `image` or `codes`, or that of the training.
            num_inference_steps (`int`, *optional*, defaults to 32): T, calls of the transformer.
            guidance_scale (`float`, *optional*, defaults to 3.0):
                Of classifier-free guidance on the logits, which 1 and less switches off.
            guidance_schedule (`str`, *optional*, defaults to `"linear"`):
                `"linear"` begins without guidance and reaches `guidance_scale` at the last step; `"constant"`.
            temperature (`float`, *optional*, defaults to 1.0): The logits are divided by it; > 0.
            order (`str`, *optional*, defaults to `"confidence"`):
                Which codes are fixed first: `"confidence"`, the likeliest, or `"random"`.
            order_temperature (`float`, *optional*, defaults to 2.0):
                Gumbel noise on the log-confidence at the first step; it falls to 0 at the last.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One, or one for each picture.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for the codes.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with the pipeline, the step, its timestep and a dict of tensors, which it
                returns, changed or not.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Of the tensors, `"codes"`, masked ones K.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or a tuple of its field.

        Raises:
            ValueError: if an argument is missing, out of range or does not fit the others.
        """
        self._check_numbers(num_inference_steps, guidance_schedule, temperature, order, order_temperature)
        if unknown := set(callback_on_step_end_tensor_inputs) - {"codes"}:
            raise ValueError(f'`callback_on_step_end_tensor_inputs` may hold "codes" only, but has {unknown}.')
        condition, count = self._encode_condition(prompt, class_labels, guidance_scale > 1)
        codes = self._prepare_codes(count, codes, image, mask_image, height, width)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` has {len(generator)} entries for {count} pictures to generate.")
        hidden = self.scheduler.config.mask_token_id
        starting_mask_ratio = (codes == hidden).flatten(1).float().mean(1, keepdim=True)
        noise = _RANDOM_ORDER if order == "random" else order_temperature
        final_noise = noise if order == "random" else 0
        self.scheduler.set_timesteps(num_inference_steps, (noise, final_noise), device=codes.device)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            progress = 1.0 if guidance_schedule == "constant" else (step + 1) / num_inference_steps
            scale = 1 + (guidance_scale - 1) * progress
            logits = self._guided_logits(codes, codes == hidden, condition, scale, guidance_scale > 1) / temperature
            codes = self._step(logits, timestep, codes, starting_mask_ratio, generator)
            if callback_on_step_end is not None:
                tensors = {name: {"codes": codes}[name] for name in callback_on_step_end_tensor_inputs}
                codes = callback_on_step_end(self, step, int(timestep), tensors).get("codes", codes)
        images = codes
        if output_type != "latent":
            images = self.image_processor.postprocess(self.vae.decode_codes(codes).sample, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    @torch.no_grad()
    def encode_condition(
        self, prompt: str | None = None, class_label: int | str | None = None
    ) -> dict[str, torch.Tensor]:
        r"""
        What the transformer is told of one picture: its arguments for a prompt or a class, or for neither.

        Args:
            prompt (`str`, *optional*): Of a text-conditional model; default: the empty one.
            class_label (`int` or `str`, *optional*): Of a class-conditional model; default: the class of none.

        Raises:
            ValueError: if the other kind of condition is given, or there is no such class.
        """
        if self.transformer.config.cross_attention_dim is not None:
            return self._encode_condition(prompt or "", class_label, False)[0]
        if class_label is None and prompt is None:
            return {"class_labels": torch.tensor([self.num_classes], device=self._execution_device)}
        return self._encode_condition(prompt, class_label, False)[0]

    def _guided_logits(self, codes, mask, condition: dict, scale: float, is_guided: bool) -> torch.Tensor:
        """Logits `[B, S, K, h, w]`; of a guided call, `condition` holds the conditions and then the empty ones."""
        if is_guided:
            codes, mask = torch.cat([codes, codes]), torch.cat([mask, mask])
        logits = self.transformer(codes, mask, **condition).logits.float()
        if not is_guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _step(self, logits, timestep, codes, starting_mask_ratio, generator) -> torch.LongTensor:
        shape = codes.shape
        logits, sample = logits.movedim(2, -1).flatten(1, 3), codes.flatten(1)
        if not isinstance(generator, list):
            step = self.scheduler.step(logits, timestep, sample, starting_mask_ratio, generator)
            return step.prev_sample.view(shape)
        parts = zip(logits.split(1), sample.split(1), starting_mask_ratio.split(1), generator)
        steps = [self.scheduler.step(part, timestep, own, ratio, source) for part, own, ratio, source in parts]
        return torch.cat([step.prev_sample for step in steps]).view(shape)

    def _encode_condition(self, prompt, class_labels, is_guided: bool) -> tuple[dict, int]:
        """The transformer's arguments, twice as many pictures long if guided, and the number of pictures."""
        takes_text = self.transformer.config.cross_attention_dim is not None
        wanted, other = ("prompt", "class_labels") if takes_text else ("class_labels", "prompt")
        given = {"prompt": prompt, "class_labels": class_labels}
        if given[wanted] is None or given[other] is not None:
            raise ValueError(f"This model takes `{wanted}`, and no `{other}`.")
        if not takes_text:
            labels = self.get_label_ids(class_labels)
            empty = [self.num_classes] * len(labels) if is_guided else []
            return {"class_labels": torch.tensor(labels + empty, device=self._execution_device)}, len(labels)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for text in prompts:
            check_tokens(text, self.tokenizer, self.text_encoder)
        texts = prompts + ([""] * len(prompts) if is_guided else [])
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        states = self.text_encoder(tokens.input_ids.to(self._execution_device)).last_hidden_state
        return {"encoder_hidden_states": states.to(self.transformer.dtype)}, len(prompts)

    def _prepare_codes(self, count: int, codes, image, mask_image, height, width) -> torch.LongTensor:
        """Codes `[B, S, h, w]` to begin with, K where they are masked."""
        if codes is not None and image is not None:
            raise ValueError("Give `codes` or `image`, not both.")
        if (image is None) != (mask_image is None):
            raise ValueError("`image` and `mask_image` go together: what the mask leaves black is kept.")
        if image is not None:
            codes = self._encode_image(image, mask_image, height, width)
        if codes is None:
            side = self.transformer.config.sample_size * self.vae_scale_factor
            size = [self._latent_side("height", height or side), self._latent_side("width", width or side)]
            codes = torch.full((count, self.vae.config.num_subspaces, *size), -1)
        self._check_codes(codes, height, width)
        if count % len(codes):
            raise ValueError(f"Cannot spread {len(codes)} pictures (`image` or `codes`) over {count} to generate.")
        codes = codes.to(self._execution_device).repeat(count // len(codes), 1, 1, 1)
        return codes.masked_fill(codes < 0, self.scheduler.config.mask_token_id)

    def _encode_image(self, image, mask_image, height, width) -> torch.LongTensor:
        pixels = self.image_processor.preprocess(image, height, width)
        mask = self.mask_processor.preprocess(mask_image, *pixels.shape[-2:])
        codes = self.vae.encode_codes(pixels.to(self._execution_device, self.vae.dtype))
        # A latent pixel is generated anew if any of its pixels is.
        hidden = F.max_pool2d(mask.to(codes.device), self.vae_scale_factor) > 0.5
        return codes.masked_fill(hidden, -1)

    def _latent_side(self, name: str, length: int) -> int:
        if length < 1 or length % self.vae_scale_factor:
            raise ValueError(
                f"`{name}` must be a positive multiple of the downsampling factor F = {self.vae_scale_factor}, but is "
                f"{length}."
            )
        return length // self.vae_scale_factor

    def _check_codes(self, codes: torch.LongTensor, height: int | None, width: int | None):
        subspaces, size = self.vae.config.num_subspaces, self.vae.config.codebook_size
        if codes.is_floating_point() or codes.ndim != 4 or codes.shape[1] != subspaces:
            raise ValueError(
                f"`codes` must be integers of shape [batch, S = {subspaces}, height, width], but are {codes.dtype} of "
                f"shape {list(codes.shape)}. Were they made by another model?"
            )
        if codes.min() < -1 or codes.max() >= size:
            raise ValueError(
                f"`codes` must lie in [-1, {size - 1}] (K = {size}; -1 is generated), but range from "
                f"{int(codes.min())} to {int(codes.max())}. Were they made by another model?"
            )
        for name, given, latent in (("height", height, codes.shape[2]), ("width", width, codes.shape[3])):
            if given is not None and given != latent * self.vae_scale_factor:
                raise ValueError(f"`{name}` is {given}, but the codes are of {latent * self.vae_scale_factor} pixels.")

    @staticmethod
    def _check_numbers(num_inference_steps, guidance_schedule, temperature, order, order_temperature):
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_inference_steps}.")
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, but is {temperature}.")
        if order_temperature < 0:
            raise ValueError(f"`order_temperature` must not be negative, but is {order_temperature}.")
        if guidance_schedule not in ("linear", "constant"):
            raise ValueError(f'`guidance_schedule` must be "linear" or "constant", but is {guidance_schedule!r}.')
        if order not in ("confidence", "random"):
            raise ValueError(f'`order` must be "confidence" or "random", but is {order!r}.')


def _check_components(vae, transformer, scheduler, text_encoder, tokenizer):
    if not isinstance(vae, PQModel):
        raise TypeError(f"`vae` must be a PQModel, whose codes are generated, but is of class {type(vae).__name__}.")
    for name in ("num_subspaces", "codebook_size"):
        own, other = transformer.config[name], vae.config[name]
        if own != other:
            raise ValueError(f"`{name}` is {own} in the `transformer`, but {other} in the `vae`.")
    if scheduler.config.mask_token_id != vae.config.codebook_size:
        raise ValueError(
            f"The `mask_token_id` of the `scheduler` must be K = {vae.config.codebook_size}, the first number that is "
            f"no code, but is {scheduler.config.mask_token_id}."
        )
    channels = transformer.config.cross_attention_dim
    if channels is None:
        return
    if text_encoder is None or tokenizer is None:
        raise ValueError("The `transformer` is told a text: give the `text_encoder` and the `tokenizer`.")
    if text_encoder.config.hidden_size != channels:
        raise ValueError(
            f"The `transformer` takes text states of {channels} channels, but the `text_encoder` gives "
            f"{text_encoder.config.hidden_size}."
        )
