# Trainings of an experiment, diagnoses of networks, and their comparison: `all` runs those that the config lists.


# One thread, as for evaluation: on a CPU, parallel trainings are faster than one on many threads. A leg is a network's
# training or one phase of a supernet's.
rule train_experiment:
    input:
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        teacher=teacher_of_leg,
        previous=previous_leg,
        control=plain_network_of_leg,
    output:
        weights="<results>/train_experiment/{leg}/weights.safetensors",
        history="<results>/train_experiment/{leg}/history.parquet",
    log:
        "<logs>/train_experiment/{leg}.log",
    benchmark:
        "<benchmarks>/train_experiment/{leg}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(16000),
        runtime=2880,
        gpu=1,
    params:
        settings=settings_of_leg,
        seed=seed_of_leg,
        networks=lambda wildcards, input: flags_of(input, "teacher", "previous", "control"),
    shell:
        "python -m proard.stages.train_experiment --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --train {input.train:q} --val {input.val:q} {params.networks}"
        " --weights {output.weights:q} --history {output.history:q} 2>&1 | tee {log:q}"


rule train_experiments:
    input:
        collect("<results>/train_experiment/{leg}/weights.safetensors", leg=LEGS),


rule measure_experiment:
    input:
        weights=lambda wildcards: weights_of(wildcards.training),
        histories=lambda wildcards: collect(
            "<results>/train_experiment/{leg}/history.parquet", leg=legs_of(wildcards.training)
        ),
        supernet=supernet_beside_twin,
        archs=archs_of_supernet,
        train=images_of_subnets,
        val=rules.prepare_data.output.val if run.experiment.measure.val_attacks else [],
        test=rules.prepare_data.output.test,
    output:
        outcomes="<results>/measure_experiment/{training}/outcomes.parquet",
    log:
        "<logs>/measure_experiment/{training}.log",
    benchmark:
        "<benchmarks>/measure_experiment/{training}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(480),
        gpu=1,
    params:
        settings=lambda wildcards: proard.config.job_settings(run, "measure_experiment", training=wildcards.training),
        seed=run.seed,
        cache=CACHE,
        beside=lambda wildcards, input: flags_of(input, "supernet", "archs", "train", "val"),
    shell:
        "python -m proard.stages.measure_experiment --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --weights {input.weights:q} --histories {input.histories:q}"
        " {params.beside} --test {input.test:q} --cache {params.cache:q} --outcomes {output.outcomes:q}"
        " 2>&1 | tee {log:q}"


rule diagnose:
    input:
        teacher=rules.train_teacher.output.teacher,
        test=rules.prepare_data.output.test,
        weights=weights_to_diagnose,
        supernet=supernet_to_diagnose,
        train=images_of_supernet_to_diagnose,
    output:
        bound="<results>/diagnose/{network}/bound.parquet",
        radii="<results>/diagnose/{network}/radii.parquet",
        summary="<results>/diagnose/{network}/summary.parquet",
    log:
        "<logs>/diagnose/{network}.log",
    benchmark:
        "<benchmarks>/diagnose/{network}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(240),
        gpu=1,
    params:
        settings=diagnose_settings,
        seed=run.seed,
        network=lambda wildcards, input: flags_of(input, "weights", "supernet", "train"),
    shell:
        "python -m proard.stages.diagnose --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --teacher {input.teacher:q} --test {input.test:q} {params.network}"
        " --bound {output.bound:q} --radii {output.radii:q} --summary {output.summary:q} 2>&1 | tee {log:q}"


rule compare_experiment:
    input:
        outcomes=collect("<results>/measure_experiment/{training}/outcomes.parquet", training=TRAININGS),
        budgets=collect(
            "<results>/select_student/{budget}/student.parquet", budget=BUDGETS if run.experiment.budgets else []
        ),
        bounds=collect("<results>/diagnose/{network}/bound.parquet", network=DIAGNOSED if NETWORKS else []),
        radii=collect("<results>/diagnose/{network}/radii.parquet", network=DIAGNOSED if NETWORKS else []),
        diagnoses=collect("<results>/diagnose/{network}/summary.parquet", network=DIAGNOSED if NETWORKS else []),
    output:
        **compared("<results>/compare_experiment"),
        table="<results>/compare_experiment/table.parquet",
    log:
        "<logs>/compare_experiment.log",
    benchmark:
        "<benchmarks>/compare_experiment.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(4000),
        runtime=30,
    params:
        settings=settings("compare_experiment"),
        seed=run.seed,
        writes=lambda wildcards, output: flags_of(output, *compared("")),
    shell:
        "python -m proard.stages.compare_experiment --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --outcomes {input.outcomes:q} --budgets {input.budgets:q}"
        " --bounds {input.bounds:q} --all-radii {input.radii:q} --diagnoses {input.diagnoses:q}"
        " --table {output.table:q} {params.writes} 2>&1 | tee {log:q}"
