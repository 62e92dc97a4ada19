"""One table of invalid calls: exit code, three lines (what, why, fix) with the words that matter, and nothing written."""

from pathlib import Path
from typing import Any

import pytest
from invalid_inputs import Places
from pipelines import Pipeline, Script

from midway.gen.evaluation import tokenizers

USAGE, DATA, DIVERGED = 2, 3, 4
HEADS = {
    "SAMPLE": "sample --model {model} --n 2 --out {out}/grid.png --nfe 4 --grid uniform",
    "JUMPS": "sample --model {jumps} --n 2 --out {out}/grid.png",
    "EVALUATE": "evaluate --model {model} --features {features} --out {out} --n 16 --exact-nfe 8 --solvers ddim --nfe 4 "
    "--grids uniform",
    "SOLVER": "train_solver amed --model {model}",
    "TOKENIZER": "train_tokenizer digits-fsq --steps 1 --batch-size 4 --model.width 16 --out {out}",
    "LATENT": "train_latent digits-dit --out {out} --tokenizer {tokenizer}",
    "CONFIG": "train_latent --config",
    "ENCODE": "encode --tokenizer",
    "BASELINE": "train_baseline vae --out {out} --steps 1",
    "LIKELIHOOD": "evaluate_likelihood --out {out} --n 20 --models",
    "TOKENIZERS": "evaluate_tokenizer --out {out} --tokenizers",
    "CHECK": "check_metric --data digits --out {out} --features",
    "IMAGES": "evaluate --data digits --features {features} --out {out} --blocks 1 --images",
    "IMPORT": "import_tokenizer --data digits --held-out 0.9 --out {out} --source",
}
"""What the words in capitals begin a call with; {name} is a run of the pipeline, or an invalid input."""
TABLE = """
2 unknown names
  SAMPLE --solver hune; EVALUATE --solvers hune -> 'hune' | did you mean 'heun'? choose one of: heun, edm_heun
  SAMPLE --grid 0.9,0.5,0.1; --grid nan; --grid 1.5 -> unknown grid | by name | choose one of
  EVALUATE --grids 0.9,0.5,0.1; --grids 1.5,0.2; --grids nan,0.2; --grids uniform,0.5 -> unknown grid | by name | choose one of
  LATENT --measure-every 4 --early.grid karas --early.features {features} -> 'karas' | did you mean 'karras'?
  SAMPLE --solver ddim --grid karas; --solver amed --grid karas -> 'karas' | did you mean 'karras'?
  EVALUATE --solvers ddim --grids karas; --solvers amed --grids karas -> 'karas' | did you mean 'karras'?
  train_tokenizer digit-fsq --out {out} -> 'digit-fsq' | did you mean 'digits-fsq'?
  train_latent digits-dti --out {out} -> 'digits-dti' | did you mean 'digits-dit'?
  train_solver amed --model {model} --grid gits --distill.mode per_step -> --grid gits with --distill.mode per_step | end_to_end
  train_solver amed-plugin-ipndm3 --model {model} --grid gits --distill.mode per_step -> per_step | end_to_end
  train_solver amedd --out {out} -> 'amedd' | did you mean 'amed'?
  train_baseline digits-gloww -> 'digits-gloww' | did you mean 'digits-glow'?
  train_baseline --steps 3 -> digits-glow
  train_solver --model {model} --solver amde -> amde | did you mean 'amed'?
  train_solver --model {model} --grid unifrom -> unifrom | did you mean 'uniform'?
  train_solver --model {model} --distill.teacher hein -> hein | did you mean 'heun'?
  download_weights incepton -> incepton | did you mean 'inception'?
  data chek digits -> did you mean 'data check'
  data check digit --out {out}; data check digits --against digit --out {out} -> did you mean 'digits'?
2 budgets
  SAMPLE --solver heun --nfe 7; EVALUATE --solvers heun --nfe 7 -> heun | NFE 7 | 6 or 8 | analytic first step
  SAMPLE --solver heun --nfe 6 --analytic-first -> NFE 6 | 5 or 7 | analytic first step
  EVALUATE --solvers heun --nfe 6 --analytic-first -> NFE 6 | 5 or 7 | analytic first step
  SOLVER --nfe 2,7 --distill.analytic-first False -> NFE 7 | 6 or 8
  SOLVER --nfe=; --nfe=4,x; --nfe=0; --nfe=4,-2; --nfe=4.5 -> --nfe | 4,6,8
  EVALUATE --solvers rk45 -> rk45 at NFE 4 | tolerance, not a budget | midway sample
  SAMPLE --solver rk45 --eta 1; --solver rk45 --analytic-first -> with rk45 | drop --
  SAMPLE --solver rk45 --rtol 0; --solver rk45 --atol nan -> positive tolerances | --rtol or --atol
  SAMPLE --solver rk45 --parallel gaussian -> --parallel with rk45
  EVALUATE --nfe=; --nfe=4,x; --nfe=0; --nfe=4,-2; --nfe=4.5 -> --nfe | 4,6,8
2 evaluate
  EVALUATE --n 1; --n 0; --blocks 0; --batch-size 0; --choice-seeds 1; --exact-nfe -1; --solvers ,; --grids= -> FLAG
  EVALUATE --eta 0.5 --solvers ddim,heun; --eta 0.5 --solvers ddim,amed -> FLAG
  EVALUATE --eta 1.5 -> eta
  EVALUATE --metrics kidd -> kid
  EVALUATE --metrics infinity -> at least 32
  EVALUATE --metrics density --n 4 -> at least 6
  EVALUATE --batch-size 2048 -> 1024
  EVALUATE --graph --overlap -> --graph and --overlap
  EVALUATE --baselines {baseline} {baseline} -> twice
  EVALUATE --analytic-first --solvers amed -> analytic first step
2 external images
  evaluate --features {features} --out {out} --images {images} -> --data is not given
  EVALUATE --data digits --images {images} -> drop --data
  EVALUATE --resize 8 --images {images} -> --images-resize
  evaluate --data digits --features {features} --images {images} -> --out
  evaluate --data digits --features {features} --out {out} -> nothing to measure
  IMAGES {images} --repeats {model} -> --repeats
2 sample
  SAMPLE --n 0; --seed -1; --batch-size 0 -> FLAG
  SAMPLE --labels 10; --labels=-1; --labels 3,10 -> --labels | classes 0 to 9
  SAMPLE --labels cat -> is none of its classes | choose one of: 0, 1
  SAMPLE --labels 3,1.5 -> is none of its classes | choose one of: 1, 5
  SAMPLE --labels , -> names no class
  SAMPLE --out grid.jpg; --out grid.tar.gz; --out samples.npy -> .png | .npz, or a folder
  SAMPLE --out {tokenizer}; --out {a_file} -> holds other files | choose another --out
  SAMPLE --out {a_file}/me.png/x.zip; --out {a_file}/me.png/x.npz; --out {a_file}/me.png/folder -> me.png | folder
  SAMPLE --strength 0.5 -> --strength without --init
  SAMPLE --init digits --strength 0; --init digits --strength 1.5; --init digits --strength nan -> --strength | up to 1
  SAMPLE --init digits --strength=-0.5; --init digits --strength inf -> --strength | above 0
  SAMPLE --init digits --invert digits; --init digits --noise n; --noise n --invert digits -> drop all but one
  SAMPLE --solver amed --init digits; --solver rk45 --init digits -> steps of its own | dpmpp2m
  SAMPLE --init digitz; --invert digitz --out n.safetensors -> unknown data source | did you mean 'digits'?
  SAMPLE --invert digits; --invert digits --out n.npz -> safetensors
  SAMPLE --invert digits --out n.safetensors --solver ddpm -> ddpm | draws noise
  SAMPLE --invert digits --out n.safetensors --solver ddim --eta 1 -> ddim --eta 1 | draws noise
  SAMPLE --invert digits --out n.safetensors --solver amed; --invert digits --out n.safetensors --solver rk45 -> steps of its own
  SAMPLE --invert digits --out n.safetensors --analytic-first -> drop --analytic-first
  SAMPLE --invert digits --out n.safetensors --parallel picard -> drop --parallel
  SAMPLE --solver heun --eta 0.5; --solver amed --eta 0.5 -> --eta
  SAMPLE --solver ddim --eta -0.5 -> eta
  SAMPLE --solver amed --analytic-first -> analytic first step
  SAMPLE --solver amed-predictor --nfe 4 --parallel gaussian -> without -predictor
  SAMPLE --parallel picard --tolerance -1 -> tolerance
  SAMPLE --parallel picard --window 0 -> window
  SAMPLE --tile 8 --tile-margin 4 -> --tile 8 --tile-margin 4
2 jumps
  SAMPLE --solver jump --nfe 2; EVALUATE --solvers consistency -> predicts at one time | no second time | use euler
  JUMPS --solver heun; --solver table; --solver amed; --solver rk45 -> average velocities of jumps | jump, consistency | velocity
  JUMPS --grid gits; --analytic-first; --eta 1 -> for solvers at one time | drop
  JUMPS --parallel gaussian -> drop --parallel
  JUMPS --guidance 2 -> train the model with guidance | --teacher RUN
  JUMPS --invert digits --out n.safetensors -> no inverse | flow model
  sample --model {consistent} --out {out}/grid.png --solver jump --nfe 2 -> to the data alone | use consistency
  evaluate --model {jumps} --features {features} --out {out} --n 16 --solvers heun --nfe 4 -> average velocities of jumps
  train_solver amed --model {jumps} -> solver for | --solver jump
  LATENT --model.objective imf --model.schedule vp --model.target velocity -> use linear or cosine
  LATENT --model.objective imf --model.schedule linear --model.target x0 -> use target velocity
  LATENT --model.objective imf --model.jump.flow-share 2 -> flow_share
  LATENT --model.objective imf --model.jump.teacher-guidance nan -> teacher_guidance
2 guidance
  SAMPLE --guidance-interval 0.1 5; --guide {twin}; --guide {model} --guidance-interval 0.1 5 -> nothing is guided
  EVALUATE --guidance-interval 0.1 5; --guide {twin} -> nothing is guided
  SAMPLE --guidance 2 --guidance-interval 5 0.1; --guidance 2 --guidance-interval -1 5 -> --guidance-interval | low < high
  SAMPLE --guidance 2 --guidance-interval 1 1; --guidance 2 --guidance-interval nan 5 -> --guidance-interval | low < high
  EVALUATE --guidance 2 --guidance-interval 5 0.1; --guidance 2 --guidance-interval -1 5 -> --guidance-interval | low < high
  SAMPLE --guidance 2 --guidance-interval 80 inf; --guidance 2 --guidance-interval 0 0.001 -> from 80 to 0.002, none of them
  EVALUATE --guidance 2 --guidance-interval 100 200; --guidance 2 --guidance-interval 0 1e-9 -> from 80 to 0.002, none of them
  SAMPLE --guidance nan; --guidance inf; --guidance=-inf -> --guidance | finite number
  EVALUATE --guidance nan; --guidance inf -> --guidance | finite number
  SOLVER --guidance nan; --guidance inf; train_solver table --model {model} --guidance nan -> --guidance | finite number
  SAMPLE --model {unconditional} --guidance 2 -> without classes | --guidance
  EVALUATE --model {unconditional} --guidance 2 -> without classes | --guidance
  EVALUATE --model {unconditional} --guidance 2 --solvers heun --nfe 5 --skip-unreachable -> without classes | --guidance
  train_solver amed --model {unconditional} --guidance 2 -> without classes | --guidance
  SAMPLE --model {one_class} --guidance 2; EVALUATE --model {one_class} --guidance 2 -> one class | drop --guidance
  train_solver amed --model {one_class} --guidance 2 -> one class | drop --guidance
  train_solver table --model {one_class} --guidance 2 -> one class | drop --guidance
  SAMPLE --model {without_dropout} --guidance 2 -> label_dropout 0 | no prediction without | drop --guidance
  EVALUATE --model {without_dropout} --guidance 2 -> label_dropout 0 | no prediction without | drop --guidance
  train_solver amed --model {without_dropout} --guidance 2 -> label_dropout 0 | no prediction without | drop --guidance
  SAMPLE --model {without_labels} --guidance 2 -> label_dropout 1 | trained without labels
  SAMPLE --guidance 2 --guide {model}; --guidance 2 --guide {twin} -> those of the model itself | less trained
  EVALUATE --guidance 2 --guide {model}; --guidance 2 --guide {twin} -> those of the model itself | less trained
  SAMPLE --guidance 2 --guide {other_schedule}; EVALUATE --guidance 2 --guide {other_schedule} -> trained alike | VP
  SAMPLE --guidance 2 --guide {other_tokenizer}; EVALUATE --guidance 2 --guide {other_tokenizer} -> another tokenizer
  SAMPLE --guidance 2 --guide {other_names} -> class names
  IMAGES {images} --guidance 2; {images} --guidance-interval 1 2; {images} --guide {model} -> no model is sampled
  SAMPLE --model {unconditional} --labels 0 -> without classes | --labels
2 learned solvers
  SAMPLE --solver amed --nfe 6 -> amed at NFE 6 | train solver amed --model {model} --nfe 6
  EVALUATE --solvers ddim,amed --nfe 4,6 -> amed at NFE 6 | train solver amed --model {model} --nfe 6
  SAMPLE --solver amed --guidance 2; EVALUATE --solvers amed --guidance 2 -> guidance 1.0 | guidance 2.0 | --guidance 1.0
2 existing outputs
  train_tokenizer digits-fsq --out {tokenizer}; train_features --out {features} -> --overwrite
  CONFIG {model}/config.yaml; SOLVER --nfe 4 --grid uniform -> --overwrite
  train_tokenizer digits-fsq --overwrite --out {a_file} -> no run directory
  train_tokenizer digits-fsq --overwrite --out {a_file}/me.png -> no run directory
  ENCODE {tokenizer} -> exists | --overwrite
  ENCODE {tokenizer} --batch-size 0 -> FLAG 0
  evaluate_likelihood --n 20 --models {baseline} --out {baseline} -> run directory
2 what is another's
  train_tokenizer digits-fsq --overwrite --out {link} -> is a link | name that folder
  TOKENIZERS {tokenizer} --out {link}; demo --quick --out {link}; EVALUATE --fresh --out {link} -> is a link
  train_tokenizer digits-fsq --overwrite --out {with_images} --held-out 0.5 --resize 8 --data {with_images}/samples/photos -> \
holds {with_images}/samples/photos | would be deleted
  posthoc_ema {model} --std 0.08 --overwrite --out {model} -> the average is made from this run
  ENCODE {tokenizer} --overwrite --out {weights_of_features} -> no folder of latents
  TOKENIZERS {tokenizer} --out {a_report} -> holds other files
  EVALUATE --out {a_report}; LIKELIHOOD {baseline} --out {a_report} -> report.md | not of an earlier report
  LIKELIHOOD {baseline} --out {a_results_json} -> results.json | not of an earlier report
  demo --quick --out {not_a_demo} -> tokenizer | not of an earlier demo
  train_tokenizer digits-fsq --out {out}/\udcff -> not UTF-8
2 configuration files
  CONFIG {extra_key} -> 'tokeniser' | did you mean 'tokenizer'?
  CONFIG {extra_inner_key} -> 'step' | did you mean 'steps'?
  CONFIG {wrong_type} -> train.steps | 'many' | int
  CONFIG {negative_rate} -> train | lr
  CONFIG {wrong_target} -> model.target | 'noise' | 'eps'
  CONFIG {wrong_heads} -> model.dit | width 30
  CONFIG {no_mapping} -> model | not a mapping
  CONFIG {gone}.yaml -> no file
  CONFIG {bad_yaml}/config.yaml; {binary_yaml}/config.yaml -> not YAML
  CONFIG {list_yaml}/config.yaml -> not a mapping
  CONFIG -> --config needs a file
  CONFIG {features}/config.yaml; train_features --config {model}/config.yaml -> unknown key
2 images and sizes
  TOKENIZER --data {wide} --held-out 0.5 -> 12x16 | square | --resize 12
  TOKENIZER --data digit -> data source | did you mean 'digits'?
  TOKENIZER --data {images} --held-out 0.5 --resize 0 -> resize
  TOKENIZER --data {images} --held-out 1 -> held_out=1.0
  TOKENIZER --model.downsample 3; --model.downsample 16 -> downsample
  TOKENIZER --model.levels 1 -> level
  TOKENIZER --accumulation 3; LATENT --accumulation 3; train_features --out {out} --accumulation 3 -> multiple of 3
  TOKENIZER --model.options normalize; --model.options [1] -> --model.options
  TOKENIZER --model.options {{"no":1}} -> tokenizer cannot be built
  LATENT --model.dit.patch 4 -> patches of 4
  train_features --out {out} --width 9 -> width
  data check digits --held-out 0 --out {out} -> held_out
  data check digits --channels 2 --out {out} -> channels
2 online evaluation and validation
  LATENT --measure-every 4 --early.solver heun --early.nfe 5 --early.features {features} -> heun
  LATENT --measure-every 4 --early.solver eulr --early.features {features} -> euler
  TOKENIZER --measure-every 1; --validate-every 1 -> FLAG
2 baselines
  BASELINE --model.downsample 16 -> downsample 16 | --model
  BASELINE --conditional --data {flat} --held-out 0.5 -> --conditional | no classes
  BASELINE --draws 0; --validation-images 0 -> FLAG 0
  train_baseline tarflow --out {out} --model.noise gaussian --validate-every 3 -> --validate-every 3 | uniform
  LIKELIHOOD {baseline} {baseline} -> twice
  LIKELIHOOD {baseline} --n 1; TOKENIZERS {tokenizer} --n 1 -> FLAG 1
  LIKELIHOOD {baseline} --draws 0 -> draws is 0
  LIKELIHOOD {baseline} --iwae -1 -> --iwae -1
2 tokenizers
  TOKENIZERS {tokenizer} --n 100000 -> 359 images are held out
  TOKENIZERS {tokenizer} --noise 0.1 -1 -> sigma is finite and >= 0
  TOKENIZERS {tokenizer} --batch-size 0; IMPORT {rgb} --batch-size 0 -> FLAG 0
  TOKENIZERS {tokenizer} --lpips-weights nowhere.pth -> LPIPS cannot be measured
  TOKENIZERS {tokenizer} {model}/../tokenizer -> named twice
  CHECK pixels,pixels -> every feature space is named once
  CHECK pixels --n 19; CHECK pixels --n 360 -> 359 are held out
  CHECK effnet-lite0-full -> mostly bias below 6400 images
  CHECK pixels --feature-weights weights.pth -> has its own weights
  CHECK pixels --out {model} -> holds other files
  TOKENIZERS {tokenizer} --features pixel -> did you mean 'pixels'?
  TOKENIZERS {tokenizer} --features effnet-lite0-full -> mostly bias below 6400 images | raise --n
  IMPORT {rgb} --resize 16 -> this takes 3 | pass --channels 3
  IMPORT {rgb} --channels 3 --resize 9 -> image_size is 9
2 averages
  posthoc_ema {model} --out {out} --std 0.5; {model} --out {out} --std nan -> width
  posthoc_ema {model} --out {out} --std 0.08 --step 26 -> step 26
3 missing inputs of samples
  SAMPLE --noise {gone}; --noise {model}/config.yaml -> cannot be read | midway sample --invert
  SAMPLE --init {gone}; --invert {gone}/x.png --out n.safetensors -> does not exist | gone
  SAMPLE --init {broken}; --init {broken}/0a.png -> 0a.png
3 missing runs
  SAMPLE --model {gone}; EVALUATE --model {gone}; train_solver amed --model {gone} -> {gone} | config.yaml | latent_model
  EVALUATE --features {gone} -> {gone} | config.yaml | features
  ENCODE {gone}; LATENT --tokenizer {gone} -> {gone} | config.yaml | tokenizer
  LIKELIHOOD {empty}; verify_resume {empty} -> {empty}
  TOKENIZERS {tokenizer} --features {gone}; {tokenizer} {gone} -> {gone} is not a run directory
  IMPORT {gone}/vae -> has no configuration
3 other kinds
  SAMPLE --model {tokenizer}; EVALUATE --model {tokenizer} -> 'tokenizer' | 'latent_model'
  train_solver amed --model {tokenizer} -> 'tokenizer' | 'latent_model'
  EVALUATE --features {model} -> 'latent_model' | 'features'
  ENCODE {features}; LATENT --tokenizer {features} -> 'features' | 'tokenizer'
  LIKELIHOOD {features} -> 'features'
  TOKENIZERS {features} -> kind 'features'
  verify_resume {imported}; train_tokenizer --config {imported}/config.yaml --out {out} -> imported, not trained
  SAMPLE --model {no_kind}; --model {list_kind}; --model {number_kind} -> of kind | 'latent_model'
3 unfinished runs
  ENCODE {unfinished_tokenizer} -> no checkpoint | --resume auto | --overwrite
  EVALUATE --features {unfinished_features} -> no checkpoint | --resume auto | --overwrite
  SAMPLE --model {unfinished_model} -> no checkpoint | --resume auto | --overwrite
  SAMPLE --model {unfinished_solver} --solver amed -> no checkpoint | --resume auto | --overwrite
3 damaged runs
  SAMPLE --model {cut_ema} -> damaged | ema.safetensors | --resume auto
  SAMPLE --model {cut_json} -> damaged | model.json | --resume auto
  SAMPLE --model {cut_inner} -> damaged | tokenizer/ | --resume auto
  SAMPLE --model {cut_config} -> damaged | tokenizer/config.json | --resume auto
  SAMPLE --model {cut_optimizer} -> damaged | optimizer.safetensors | --resume auto
  SAMPLE --model {sealed_ema}; --model {sealed_json}; --model {sealed_inner} -> cannot be read | again
  SAMPLE --model {sealed_config}; --model {other_width} -> cannot be read | again
  ENCODE {cut_tokenizer_inner}; {cut_tokenizer_config} -> damaged | tokenizer/
  ENCODE {sealed_tokenizer_inner}; {sealed_tokenizer_config} -> cannot be read | again
  EVALUATE --features {cut_features} -> damaged | features.safetensors
  EVALUATE --features {sealed_features} -> features.safetensors | cannot be read | train features
  LIKELIHOOD {cut_best} -> damaged | ema.safetensors
  SAMPLE --model {cut_solver} --solver amed -> damaged | solver.safetensors
  SAMPLE --model {sealed_solver} --solver amed -> \
solver.safetensors | cannot be read | train solver amed | --nfe 4 | --overwrite
3 configurations of runs
  SAMPLE --model {model_without_data}; EVALUATE --model {model_without_data} -> config.yaml | data is not a mapping
  train_solver amed --model {model_of_null_data}; posthoc_ema {model_of_null_data} --std 0.08 --out {out} -> data is not a mapping
  ENCODE {tokenizer_without_data}; LATENT --tokenizer {tokenizer_of_null_data} -> config.yaml | data is not a mapping
  TOKENIZERS {tokenizer_without_data}; {tokenizer_of_null_data} -> config.yaml | data is not a mapping
  EVALUATE --features {features_without_data}; --features {features_of_null_data} -> config.yaml | data is not a mapping
  LIKELIHOOD {baseline_without_data}; {baseline_of_null_data} -> config.yaml | data is not a mapping
  SAMPLE --model {model_without_training}; EVALUATE --model {model_of_listed_training} -> config.yaml | train is not a mapping
  verify_resume {model_of_listed_training}; verify_resume {baseline_of_null_data} -> config.yaml | not a mapping
  SAMPLE --model {model_of_odd_average} -> posthoc.std | 'narrow'
  SAMPLE --model {config_in_a_folder}; LIKELIHOOD {config_in_a_folder} -> config.yaml cannot be read | directory
  SAMPLE --model {bad_yaml}; verify_resume {bad_yaml}; LIKELIHOOD {binary_yaml} -> config.yaml is not YAML
3 other tensors
  ENCODE {half_tokenizer}; SAMPLE --model {half_inner} -> cannot be read | missing
  ENCODE {pickled_tokenizer} -> pickled weights
  SAMPLE --model {whole_numbers} -> int64 | instead of float32
  EVALUATE --features {diverged_features} -> not finite
3 learned solvers that are none
  SAMPLE --model {nan_table} --solver table --nfe 3 -> solver.safetensors cannot be read | not finite | train solver table
  SAMPLE --model {noisy_table} --solver table --nfe 3 -> solver.safetensors cannot be read | no learned solver but adasde
  SAMPLE --model {rising_table} --solver table --nfe 3; --model {rising_amed} --solver amed -> solver.safetensors | fall
  SAMPLE --model {outside_table} --solver table --nfe 3 -> solver.safetensors | times are in [0, 1]
  SAMPLE --model {empty_table} --solver table --nfe 3 -> solver.safetensors | weighs nothing
  SAMPLE --model {narrow_table} --solver table --nfe 3 -> solver.safetensors | float32 of shape (3, 3), not float64
  SAMPLE --model {retyped_table} --solver table --nfe 3 -> solver.safetensors | nfe of the card is '3', not int
  SAMPLE --model {unsealed_table} --solver table --nfe 3 -> solver.safetensors | saved with
  SAMPLE --model {vp_table} --solver table --nfe 3 -> solver.safetensors | was made for VP
  SAMPLE --model {of_4_table} --solver table --nfe 3 -> solver.safetensors | at NFE 4
  EVALUATE --model {nan_table} --solvers ddim,table --nfe 3; --model {nan_amed} --solvers ddim,amed -> cannot be read | finite
  SAMPLE --model {of_6_amed} --solver amed -> solver.safetensors | NFE 6
  SAMPLE --model {of_karras_amed} --solver amed; --model {moved_amed} --solver amed -> in the place of amed
  SAMPLE --model {of_another_base_amed} --solver amed -> solver.safetensors | go together
  SAMPLE --model {retyped_amed} --solver amed -> solver.safetensors | guidance of the card is '1', not float
3 runs that do not fit
  EVALUATE --features {other_features} -> trained on other images | train features
  LATENT --latents {cache_of_tokenizer} -> stale | tokenizer is | midway encode
  LATENT --latents {cache_of_split} -> stale | data is | midway encode
  LATENT --latents {weights_of_features} -> latent cache | midway encode
  LATENT --latents {gone} -> no latents at | midway encode
  SAMPLE --model {foreign_solvers} --solver amed; EVALUATE --model {foreign_solvers} --solvers amed -> \
other weights | --model {foreign_solvers} --nfe 4 --grid uniform --overwrite
  LIKELIHOOD {new_flow} --features none -> not been initialised from data
  LIKELIHOOD {flow} {flow_of_256_levels} -> other levels
  LIKELIHOOD {flow_of_4_levels} --features none -> none of 4 levels
  LIKELIHOOD {flow} {flow_of_other_images} -> trained on other images
  posthoc_ema {no_snapshots} --std 0.1 --out {out} -> --posthoc 0.05 0.10
  TOKENIZERS {tokenizer} {tokenizer_of_another_split} -> trained on other images
  TOKENIZERS {tokenizer_of_another_split} --features {features} -> trained on other images than the tokenizers
  TOKENIZERS {tokenizer_of_another_size} --features none -> takes (1, 8, 8) images
  TOKENIZERS {tokenizer} --features {large_features} -> measures (1, 16, 16) images
  IMPORT {constant} -> cannot be standardised | latent channel 1, 2 | every channel of the images varies | longer
  ENCODE {blueless}; train_latent digits-dit --out {out} --tokenizer {blueless} -> channel 3 of 3 (blue) is 0 | --channels 1
  EVALUATE --baselines {model} -> kind
  EVALUATE --repeats {unconditional} -> no repeat
  EVALUATE --repeats {model} -> weights of
  EVALUATE --features inception --inception-weights {gone}.pth -> gone.pth
  EVALUATE --features inception --inception-weights {no_weights}/pt_inception-2015-12-05-6726825d.pth -> 6726825d.pth
  IMAGES {images} --resize 16 --held-out 0.2 -> resize
3 images
  IMAGES {empty_sample}; {flipped_sample}; {halved_sample} -> 007.png
  IMAGES {images} -> 12 | --images-resize
  data check {empty} -> empty
  data check {empty}/nowhere; TOKENIZER --held-out 0.5 --data {empty}/nowhere -> does not exist
  TOKENIZER --held-out 0.5 --data {empty} -> empty
  TOKENIZER --held-out 0.01 --data {images} -> split
  TOKENIZER --held-out 0.5 --data {broken} -> 0a.png
  TOKENIZER --held-out 0.5 --data {sizes} -> --resize
2 outputs that are something else
  EVALUATE --out {a_file}/me.png; --out {a_file}/me.png/out -> me.png | name a folder
  EVALUATE --save-images {a_file}/me.png/zips -> --save-images | name a folder
  LIKELIHOOD {baseline} --out {a_file}/me.png/out; TOKENIZERS {tokenizer} --out {a_file}/me.png/out -> me.png | name a folder
  SAMPLE --out {a_file}/me.png/grid.png; ENCODE {tokenizer} --out {a_file}/me.png/l -> me.png | folder
  train_features --out {a_file}/me.png/run --steps 1; demo --quick --out {a_file}/me.png -> me.png | folder
4 samples
  SAMPLE --guidance 1e38 --nfe 8 -> diverged | finite
2 sizes and seeds that fill a machine or make nothing, before anything is built
  TOKENIZER --model.width 1000000000; --model.width 0 -> width is | 65,536
  TOKENIZER --model.blocks 1000000000; --model.blocks -1 -> blocks is | 1,000
  TOKENIZER --model.network vit --model.depth 1000000000; --model.network vit --model.depth 0 -> depth is | 1,000
  TOKENIZER --model.network vit --model.heads 0 -> heads is
  TOKENIZER --model.width 60000 --model.blocks 900 -> too large | GiB
  TOKENIZER --model.quantizer vq --model.codebook-size 4000000000000000000 -> too large | this machine
  TOKENIZER --batch-size 1000000000; --batch-size 99999999999999999999999 -> batch_size is | 1,048,576
  TOKENIZER --seed 18446744073709551616; --seed 9223372036854775807 -> seed is
  TOKENIZER --split-seed 18446744073709551616; --split-seed -1 -> split_seed is
  TOKENIZER --lr inf; --weight-decay inf -> finite
  TOKENIZER --clip nan; --clip -1 -> clip is
  TOKENIZER --max-seconds nan; --max-seconds -1 -> max_seconds is
  TOKENIZER --model.options {nested} -> is not JSON
  TOKENIZER --posthoc 0.5; --posthoc nan; --posthoc 0 -> posthoc is
  TOKENIZER --model.options {{"base":3}} --model.quantizer residual -> this tokenizer cannot be built
  TOKENIZER --model.options {{"levels":"ab"}}; --model.options {{"levels":[8,"x"]}} -> cannot be built
  TOKENIZER --model.options {{"levels":8}} -> cannot be built
  TOKENIZER --model.quantizer vq --model.options {{"decay":"high"}} -> cannot be built
  TOKENIZER --model.quantizer vq --model.options {{"decay":null}} -> cannot be built
  TOKENIZER --loss.adversary hinge --loss.critic-width 0 -> critic_width is
  LATENT --model.dit.width 0; --model.dit.width 1000000000 -> width is
  LATENT --model.dit.heads 0; --model.dit.patch 0; --model.dit.depth 1000000000 -> is
  LATENT --model.dit.width 60000 --model.dit.depth 900 -> too large | GiB
  LATENT --model.label-dropout nan; --model.label-dropout 2 -> label_dropout is
  LATENT --model.time-std 0 -> time_std is
  BASELINE --model.width 1000000000; --model.blocks 1000000000; --model.downsample 0 -> is
  BASELINE --model.width 60000 --model.blocks 900 -> too large
  train_features --out {out} --width 1000000000; train_features --out {out} --dim 1000000000 -> it can be
  SOLVER --distill.trajectories 1000000000; --distill.teacher-steps 1000000000; --distill.seed -1 -> is
  SAMPLE --seed 18446744073709551616; --n 1000000000; --nfe 1000000000; --batch-size 1000000000 -> FLAG
  EVALUATE --seed 18446744073709551616; --blocks 1000000000; --batch-size 1000000000; --n 1000000000 -> FLAG
  LIKELIHOOD {baseline} --seed 18446744073709551616; {baseline} --ode.steps 0; {baseline} --ode.probes 0 -> it can be
  TOKENIZERS {tokenizer} --seed 18446744073709551616 -> --seed | it can be
  TOKENIZERS {tokenizer} --noise nan -> sigma is finite
  ENCODE {tokenizer} --batch-size 1000000000 -> --batch-size
  verify_resume {model} --steps 1; verify_resume {model} --steps -3 -> --steps | it can be
2 names that no file can have
  demo --quick --out {loop}; EVALUATE --images {loop} -> leads back to itself
  train_tokenizer digits-fsq --steps 1 --out {long}; EVALUATE --out {long}; SAMPLE --out {long}.png -> shorter
  ENCODE {tokenizer} --out {long}; train_tokenizer --config {long}; data check {long} -> shorter
"""
UNPARSED = """
2 flags
  sample --model m --solvr ddim -> unknown flag | did you mean '--solver'?
  evaluate --model m --features f --solver ddim -> unknown flag | did you mean '--solvers'?
  train_tokenizer digits-fsq --levels 8 -> unknown flag | did you mean '--model.levels'?
  train_latent digits-dit --model.width 64 -> unknown flag | did you mean '--model.dit.width'?
  train_features --withd 8 -> unknown flag | did you mean '--width'?
  train_solver amed --model m --trajectories 9 -> unknown flag | did you mean '--distill.trajectories'?
  encode --tokeniser t --tokenizer t -> unknown flag | did you mean '--tokenizer'?
  sample; evaluate; train_solver amed -> --model
  encode -> --tokenizer
  sample --model m --nfe few -> --nfe | few
  train_latent digits-dit --model.dit.width 30 -> width 30
  train_latent digits-dit --model.target epsilom -> epsilom | did you mean 'eps'?
  train_tokenizer digits-fsq --betas 0.9 -> betas
  train_tokenizer digits-fsq --lr -1 -> lr
  train_tokenizer digits-fsq --ema 1 -> ema
  train_tokenizer digits-fsq --batch-size 0 -> batch_size
  train_tokenizer digits-fsq --log-every 0 -> log_every
  train_tokenizer digits-fsq --accumulation 0 -> accumulation
"""


def rows(table: str) -> list[Any]:
    """(exit code, arguments, words) of every call of a table.

    Its lines are headings, which begin with the exit code of what follows, and `  call; call -> words | words`. A call without
    a script takes that of the call before; FLAG is the name of the call's first flag."""
    found, heading, head = list[Any](), "", ""
    for line in filter(None, table.splitlines()):
        if not line.startswith("  "):
            heading = line
            continue
        calls, words = line.strip().split(" -> ")
        for call in calls.split("; "):
            if call[0].isalpha():
                head, _, call = call.partition(" ")
            flag = next((word.partition("=")[0] for word in call.split() if word.startswith("--")), "")
            arguments = f"{HEADS.get(head, head)} {call}".strip().split(" ")
            wanted = words.replace("FLAG", flag).split(" | ")
            found.append(pytest.param(int(heading[0]), arguments, wanted, id=f"{heading[2:]}: {head} {call}"))
    return found


@pytest.fixture(scope="module")
def places(pipeline: Pipeline, unconditional: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    runs = {name: getattr(pipeline, name) for name in ("model", "tokenizer", "features", "baseline")}
    root = tmp_path_factory.mktemp("places")
    return Places(pipeline, root, {**runs, "unconditional": unconditional, "gone": root / "gone"})


def files(*roots: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file, and every directory, under these folders."""
    found = (path for root in roots for path in root.rglob("*"))
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else (0, 0) for p in found}


@pytest.mark.parametrize(("code", "arguments", "words"), rows(TABLE))
def test_an_invalid_call_exits_with_three_lines_and_writes_nothing(
    code: int,
    arguments: list[str],
    words: list[str],
    script: Script,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it measure a tokenizer first."""
    monkeypatch.setattr(tokenizers, "measure", None)
    places |= {"out": tmp_path / "out", "long": tmp_path / ("long" * 80), "nested": "[" * 5000}
    call = [part.format_map(places) for part in arguments]
    roots = (places.pipeline.root, places.root, tmp_path)
    before = files(*roots)
    done = script(*call)
    assert done.code == code, done
    assert files(*roots) == before
    lines = done.err.strip().splitlines()
    assert [line[:7] for line in lines[-3:]] == ["error: ", "  why: ", "  fix: "], done.err
    assert all(len(line) > 11 for line in lines[-3:]) and "Traceback" not in done.err
    assert [word for word in words if word.format_map(places) not in "\n".join(lines[-3:])] == [], done.err


@pytest.mark.parametrize(("code", "arguments", "words"), rows(UNPARSED))
def test_a_flag_that_cannot_be_parsed_exits_with_three_lines(
    code: int, arguments: list[str], words: list[str], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "50")
    done = script(*arguments)
    assert done.code == code
    assert [line[:7] for line in done.err.splitlines()] == ["error: ", "  why: ", "  fix: "], done.err
    assert all(word in done.err for word in words)
    assert script(arguments[0], "--help").code == 0


# ---- other endings ----


def test_training_that_diverges_exits_with_4(script: Script, pipeline: Pipeline, tmp_path: Path) -> None:
    done = script(
        *("train_latent", "--config", pipeline.model / "config.yaml", "--out", tmp_path / "m"),
        *("--lr", 1e30, "--warmup", 0, "--patience", 3),
    )
    assert done.code == DIVERGED and "diverged by step" in done.err and "--lr" in done.err
    assert not (tmp_path / "m/checkpoints").exists()


def test_valid_neighbours_of_the_table_run(script: Script, places: Places, tmp_path: Path) -> None:
    """An unconditional model samples, one that jumps does so by default, and an image folder trains."""
    places["out"] = tmp_path
    for flags in ("--nfe 2", "--nfe 1 --graph", "--solver consistency --nfe 3", "--init digits --strength 0.5 --nfe 4"):
        done = script(*f"{HEADS['JUMPS']} {flags}".format_map(places).split())
        assert done.code == 0 and (tmp_path / "grid.png").exists(), done.err
        (tmp_path / "grid.png").unlink()
    done = script(*f"{HEADS['SAMPLE']} --model {{unconditional}}".format_map(places).split())
    assert done.code == 0 and (tmp_path / "grid.png").exists(), done.err
    places["out"] = tmp_path / "run"
    done = script(*f"{HEADS['TOKENIZER']} --data {{images}} --held-out 0.5".format_map(places).split())
    assert done.code == 0 and "4 images, 12x12" in done.out, done.err


def test_debug_prints_the_traceback_as_well(script: Script, tmp_path: Path) -> None:
    done = script("encode", "--tokenizer", tmp_path, "--debug")
    assert done.code == DATA
    assert "Traceback" in done.err and done.err.strip().splitlines()[-1].startswith("  fix: ")


def test_an_interrupt_exits_with_130(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("midway.gen.commands.sample.load_adapted", interrupt)
    done = script("sample", "--model", tmp_path)
    assert done.code == 130
    assert done.err == "stopped by SIGINT: no result was stored; the same command starts again\n"
