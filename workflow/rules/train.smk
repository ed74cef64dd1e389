# A training keeps its resume state beside its outputs, under names that no rule declares: Snakemake deletes declared
# outputs of a job that starts or fails. So a job that runs out of time loses little: the next attempt continues.
# Priorities: first the chain of trainings, on which all other jobs depend; the control uses cores that are idle.


rule train_teacher:
    input:
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        control=plain_network(run.train_teacher),
        file=file_of_teacher,
    output:
        teacher="<results>/train_teacher/teacher.safetensors",
        history="<results>/train_teacher/history.parquet",
    log:
        "<logs>/train_teacher.log",
    benchmark:
        "<benchmarks>/train_teacher.tsv"
    priority: 2
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        mem_mb=per_attempt(16000),
        runtime=1440,
        gpu=1,
        save_every_minutes=f"{run.save_every_minutes:g}",
    params:
        settings=settings("train_teacher"),
        seed=run.seed,
        control=lambda wildcards, input: f"--control {input.control}" if input.control else "",
    shell:
        "python -m proard.stages.train_teacher --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --save-every-minutes {resources.save_every_minutes}"
        " --train {input.train:q} --val {input.val:q} {params.control}"
        " --teacher {output.teacher:q} --history {output.history:q} 2>&1 | tee {log:q}"


rule train_control:
    input:
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        test=rules.prepare_data.output.test,
    output:
        control="<results>/train_control/control.safetensors",
        table="<results>/train_control/table.parquet",
        history="<results>/train_control/history.parquet",
    log:
        "<logs>/train_control.log",
    benchmark:
        "<benchmarks>/train_control.tsv"
    conda:
        "../../environment.yml"
    threads: parallel_threads(8)
    resources:
        mem_mb=per_attempt(16000),
        runtime=1440,
        gpu=1,
        save_every_minutes=f"{run.save_every_minutes:g}",
    params:
        settings=settings("train_control"),
        seed=run.seed,
    shell:
        "python -m proard.stages.train_control --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --save-every-minutes {resources.save_every_minutes}"
        " --train {input.train:q} --val {input.val:q} --test {input.test:q}"
        " --control {output.control:q} --table {output.table:q} --history {output.history:q} 2>&1 | tee {log:q}"


rule train_phase:
    input:
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        teacher=rules.train_teacher.output.teacher,
        previous=previous_supernet,
        control=plain_network_of_phase,
    output:
        supernet="<results>/train_phase/{phase}/supernet.safetensors",
        history="<results>/train_phase/{phase}/history.parquet",
    log:
        "<logs>/train_phase/{phase}.log",
    benchmark:
        "<benchmarks>/train_phase/{phase}.tsv"
    priority: 2
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        mem_mb=per_attempt(16000),
        runtime=2880,
        gpu=1,
        save_every_minutes=f"{run.save_every_minutes:g}",
    params:
        settings=phase_settings,
        seed=run.seed,
        previous=lambda wildcards, input: f"--previous {input.previous}" if input.previous else "",
        control=lambda wildcards, input: f"--control {input.control}" if input.control else "",
    shell:
        "python -m proard.stages.train_phase --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --save-every-minutes {resources.save_every_minutes}"
        " --train {input.train:q} --val {input.val:q}"
        " --teacher {input.teacher:q} {params.previous} {params.control}"
        " --supernet {output.supernet:q} --history {output.history:q} 2>&1 | tee {log:q}"


rule train_phases:
    input:
        SUPERNET,
